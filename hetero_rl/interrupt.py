"""What may end a run early without costing a step: Ctrl-C, SIGTERM, and an engine or a reward that fails while a rollout is made."""

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
def stop_signals(view: View) -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT (Ctrl-C) or SIGTERM (a scheduler's notice); the second Ctrl-C stops at once."""
    received: list[int] = []

    def on_signal(signum: int, frame: object) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:
            received.append(signum)
            how = "interrupted" if signum == signal.SIGINT else "told to end (SIGTERM)"
            view.warn(f"{how}: finishing this step and saving a checkpoint; press Ctrl-C again to stop at once")

    previous = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


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
            save_checkpoint(folder, state, learner, config.checkpoint)
            view.warn(f"saved a checkpoint of step {state.step}; once the cause is removed, --resume goes on from there")
        except OSError as error:
            view.warn(f"no checkpoint of step {state.step} could be saved: {error}")
        raise
