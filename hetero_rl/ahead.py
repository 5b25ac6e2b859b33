"""When rollouts are made: for this step now, or for the next one while the learner works on this one.

    sync            sample k+1 ──▶ learn k+1 ──▶ publish ──▶ sample k+2 ──▶ ...
    one_step_off    sample k+1 │ learn k ──▶ publish ──▶ sample k+2 │ learn k+1 ──▶ publish ──▶ ...

One step off, rollouts are of the weights before the last update. Their staleness is measured apart from the engine gap and
corrected by the policy loss, as that of several updates is. A checkpoint on schedule empties the pipeline: the step after it
samples for itself. One that a signal or a failure makes holds what was sampled ahead. Either way a resumed run does what the
uninterrupted one did. Where it was the sampling ahead that failed, the resume samples anew, from the weights of then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy_targets.engines.wire import decoded, encoded, pack_generations, unpack_generations
from hetero_rl.rollout import train_sequences
from hetero_rl.tasks.base import Problem
from hetero_rl.types import Rollouts, TrainSequence

Logps = NDArray[np.float32]


class Timed(NamedTuple):
    """Rollouts and the seconds of each phase of making them, by the name of its metric.

    `old_logps`, of the responses that have a reward: the learner's log-probs under the weights that sampled them, float32 [num_tokens],
    where these were taken from a checkpoint and the weights are gone.
    """

    rollouts: Rollouts
    seconds: dict[str, float]
    old_logps: list[Logps] | None = None


class Ahead:
    """Makes the rollouts of each step, at most one step ahead; the engine is busy from `start` to `wait`."""

    def __init__(
        self, collect: Callable[[int, Callable[[str], None]], Rollouts], step: int = 0, made: Mapping[str, Any] | None = None
    ) -> None:
        """`collect` makes the rollouts of a step and books its phases; those of `step` are `made` (`packed`) where they are given."""
        self._collect = collect
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._next: tuple[int, Future[Timed]] | None = None
        if made is not None:
            self._next = step, Future()
            self._next[1].set_result(unpacked(made))

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

    def packed(self, old_logps: Callable[[list[TrainSequence]], list[Logps]]) -> dict[str, Any] | None:
        """What was made ahead and not taken yet, as JSON, with what `old_logps` says of it; None where there is nothing to keep."""
        if self._next is None or self._next[1].exception() is not None:
            return None
        made = self._next[1].result()
        rollouts = made.rollouts
        if not np.isfinite(rollouts.rewards).any():
            return None
        logps = made.old_logps
        if logps is None:
            logps = old_logps(train_sequences(rollouts, np.zeros_like(rollouts.rewards)))
        return {
            "prompts": [problem.prompt for problem in rollouts.problems],
            "tokens": [generation.prompt for generation in rollouts.generations[:: rollouts.rewards.shape[1]]],
            "generations": pack_generations(rollouts.generations),
            "rewards": rollouts.rewards.tolist(),
            "weight_version": rollouts.weight_version,
            "num_replaced": rollouts.num_replaced,
            "num_replaced_tokens": rollouts.num_replaced_tokens,
            "seconds": made.seconds,
            "old_logps": encoded(np.concatenate(logps)),
            "lengths": [len(array) for array in logps],
        }

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


def unpacked(packed: Mapping[str, Any]) -> Timed:
    """What `Ahead.packed` was made from. Of the problems it has the prompts alone: their rewards are given already."""
    rewards = np.array(packed["rewards"], np.float32)
    rollouts = Rollouts(
        [Problem(prompt, "") for prompt in packed["prompts"]],
        unpack_generations(packed["generations"], [prompt for prompt in packed["tokens"] for _ in range(rewards.shape[1])]),
        rewards,
        packed["weight_version"],
        packed["num_replaced"],
        packed["num_replaced_tokens"],
    )
    return Timed(rollouts, dict(packed["seconds"]), decoded(packed["old_logps"], "<f4", packed["lengths"]))
