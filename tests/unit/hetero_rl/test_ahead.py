"""Rollouts made ahead: the right step, its own seconds, its own errors, and an engine that is idle when it must be."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import numpy as np
import pytest

from deploy_targets.types import Generation
from hetero_rl.ahead import Ahead, Logps
from hetero_rl.tasks.base import Problem
from hetero_rl.types import Rollouts, TrainSequence


def rollouts_of(step: int, lap: Callable[[str], None]) -> Rollouts:
    lap("perf/rollout_s")
    return Rollouts([], [], np.zeros((0, 2), np.float32), weight_version=step)


def test_rollouts_begun_are_those_taken() -> None:
    with Ahead(rollouts_of) as ahead:
        assert ahead.take(0).rollouts.weight_version == 0
        ahead.start(1)
        ahead.wait()
        rollouts, seconds, _ = ahead.take(1)
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


def test_what_was_made_ahead_travels_in_a_checkpoint() -> None:
    """Bit for bit, as JSON; the learner's log-probs of those weights too, which no one can compute any more."""
    generations = [
        Generation((1, 2), np.array([3, 4 + index], np.int32), np.array([-0.1, -index / 3], np.float32), 7, 0.9, "length")
        for index in range(4)
    ]
    rewards = np.array([[1.0, 0.1], [np.nan, 0.3]], np.float32)
    made = Rollouts([Problem("1+1=", "2"), Problem("2+2=", "4")], generations, rewards, 7, num_replaced=1, num_replaced_tokens=5)
    asked: list[TrainSequence] = []

    def old_logps(sequences: list[TrainSequence]) -> list[Logps]:
        asked.extend(sequences)
        return [sequence.engine_logp / 3 for sequence in sequences]

    with Ahead(lambda step, lap: made) as ahead:
        assert ahead.packed(old_logps) is None, "nothing was begun"
        ahead.start(4)
        packed = json.loads(json.dumps(ahead.packed(old_logps)))
        assert ahead.take(4).old_logps is None
    assert len(asked) == 3, "the responses that have a reward"
    with Ahead(rollouts_of, 4, packed) as resumed:
        assert json.loads(json.dumps(resumed.packed(old_logps))) == packed, "saved again before it was taken"
        found = resumed.take(4)
        assert resumed.take(5).rollouts.weight_version == 5
    assert len(asked) == 3
    np.testing.assert_array_equal(found.rollouts.rewards, rewards)
    for one, two in zip(found.rollouts.generations, generations, strict=True):
        assert (one.prompt, one.weight_version, one.temperature, one.finish_reason) == (two.prompt, 7, 0.9, "length")
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.logps, two.logps)
    assert found.rollouts.num_tokens == made.num_tokens
    assert [problem.prompt for problem in found.rollouts.problems] == ["1+1=", "2+2="]
    for known, sequence in zip(found.old_logps or [], asked, strict=True):
        np.testing.assert_array_equal(known, sequence.engine_logp / 3)


def test_what_failed_or_earned_nothing_is_made_anew() -> None:
    def failing(step: int, lap: Callable[[str], None]) -> Rollouts:
        raise ValueError("the judge is down")

    for make in (failing, rollouts_of):
        with Ahead(make) as ahead:
            ahead.start(1)
            assert ahead.packed(lambda sequences: []) is None
