"""Rollouts made ahead: the right step, its own seconds, its own errors, and an engine that is idle when it must be."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from hetero_rl.ahead import Ahead
from hetero_rl.types import Rollouts


def rollouts_of(step: int, lap: Callable[[str], None]) -> Rollouts:
    lap("perf/rollout_s")
    return Rollouts([], [], np.zeros((0, 2), np.float32), weight_version=step)


def test_rollouts_begun_are_those_taken() -> None:
    with Ahead(rollouts_of) as ahead:
        assert ahead.take(0).rollouts.weight_version == 0
        ahead.start(1)
        ahead.wait()
        rollouts, seconds = ahead.take(1)
        assert rollouts.weight_version == 1
        assert seconds["perf/rollout_s"] >= 0
        assert ahead.take(2).rollouts.weight_version == 2, "nothing was begun: made now"


def test_it_samples_while_others_work_and_wait_waits() -> None:
    may_end, ended = threading.Event(), []

    def slow(step: int, lap: Callable[[str], None]) -> Rollouts:
        assert may_end.wait(10)
        ended.append(step)
        return rollouts_of(step, lap)

    with Ahead(slow) as ahead:
        ahead.start(1)
        assert not ended
        may_end.set()
        ahead.wait()
        assert ended == [1]


def test_what_went_wrong_is_said_when_the_rollouts_are_wanted() -> None:
    def failing(step: int, lap: Callable[[str], None]) -> Rollouts:
        raise ValueError("the judge is down")

    with Ahead(failing) as ahead:
        ahead.start(1)
        ahead.wait()
        with pytest.raises(ValueError, match="judge is down"):
            ahead.take(1)
