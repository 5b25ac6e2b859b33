"""What may end a run early without costing a step: Ctrl-C, and an engine or a reward that fails while a rollout is made."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hetero_rl.checkpoint import LoopState, save_checkpoint
from hetero_rl.config import RunConfig
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.view import View


@contextmanager
def interrupt_flag(view: View) -> Iterator[list[bool]]:
    """A list that becomes non-empty on the first Ctrl-C; the second one stops at once."""
    flag: list[bool] = []

    def on_interrupt(signum: int, frame: object) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)
        view.warn("interrupted: finishing this step and saving a checkpoint; press Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def saved_on_failure(folder: Path, state: LoopState, learner: Learner, config: RunConfig, view: View) -> Iterator[None]:
    """Around code of others that runs while learner and engine stand where `state` says: what it raises costs no step."""
    try:
        yield
    except Exception:
        if state.step % config.loop.publish_every != 0:
            view.warn("this is between two publishes, where no checkpoint can be made; --resume goes on from the last one")
            raise
        try:
            save_checkpoint(folder, state, learner, config.checkpoint.keep)
            view.warn(f"saved a checkpoint of step {state.step}; once the cause is removed, --resume goes on from there")
        except OSError as error:
            view.warn(f"no checkpoint of step {state.step} could be saved: {error}")
        raise
