"""What may end a run early without costing a step: Ctrl-C, SIGTERM, and an engine or a reward that fails."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hetero_rl.checkpoint import LoopState
from hetero_rl.config import RunConfig
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
def saved_on_failure(
    save: Callable[[LoopState], None], state: LoopState, config: RunConfig, view: View, kinds: type[Exception] = Exception
) -> Iterator[None]:
    """Around code of others that runs while the learner stands where `state` says: what it raises, of these kinds, costs no step."""
    try:
        yield
    except kinds:
        if config.learner.offload == "nvme":
            raise
        if not config.loop.publishes(state.step):
            view.warn("this is between two publishes, where no checkpoint can be made; --resume goes on from the last one")
            raise
        try:
            save(state)
            view.warn(f"saved a checkpoint of step {state.step}; once the cause is removed, --resume goes on from there")
        except Exception as error:
            view.warn(f"no checkpoint of step {state.step} could be saved: {error}")
        raise
