"""When rollouts are made: for this step now, or for the next one while the learner works on this one.

    sync            sample k+1 ──▶ learn k+1 ──▶ publish ──▶ sample k+2 ──▶ ...
    one_step_off    sample k+1 │ learn k ──▶ publish ──▶ sample k+2 │ learn k+1 ──▶ publish ──▶ ...

One step off, rollouts are of the weights before the last update. Their staleness is measured apart from the engine gap and
corrected by the policy loss, as that of several updates is. A checkpoint empties the pipeline: the step after it samples for
itself, so that a resumed run does what the uninterrupted one did.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

from hetero_rl.types import Rollouts


class Timed(NamedTuple):
    """Rollouts and the seconds of each phase of making them, by the name of its metric."""

    rollouts: Rollouts
    seconds: dict[str, float]


class Ahead:
    """Makes the rollouts of each step, at most one step ahead; the engine is busy from `start` to `wait`."""

    def __init__(self, collect: Callable[[int, Callable[[str], None]], Rollouts]) -> None:
        """`collect` makes the rollouts of a step and books its phases."""
        self._collect = collect
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._next: tuple[int, Future[Timed]] | None = None

    def take(self, step: int) -> Timed:
        """The rollouts of `step`: those begun ahead, or made now. Raises what making them raised."""
        if self._next is None:
            return self._timed(step)
        begun_for, future = self._next
        assert begun_for == step
        self._next = None
        return future.result()

    def start(self, step: int) -> None:
        """Begin the rollouts of `step` in the background, with the weights that the engine serves now."""
        assert self._next is None
        self._next = (step, self._pool.submit(self._timed, step))

    def wait(self) -> None:
        """Until the engine is idle; what went wrong is for `take` to say."""
        if self._next is not None:
            self._next[1].exception()

    def _timed(self, step: int) -> Timed:
        seconds: dict[str, float] = {}
        last = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds[name] = seconds.get(name, 0.0) + now - last
            last = now

        return Timed(self._collect(step, lap), seconds)

    def __enter__(self) -> Ahead:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for what is under way: nobody may close an engine that samples."""
        self._pool.shutdown(wait=True, cancel_futures=True)
