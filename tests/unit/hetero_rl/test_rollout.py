"""From responses to training sequences: what is dropped, what is counted."""

from __future__ import annotations

import numpy as np
import pytest

from deploy_targets.types import Generation
from hetero_rl.errors import RewardError
from hetero_rl.rollout import train_sequences
from hetero_rl.tasks.base import Problem
from hetero_rl.types import Rollouts


def rollouts(*rewards: float) -> Rollouts:
    generations = [
        Generation((1, 2), np.array([i], np.int32), np.array([-0.5], np.float32), weight_version=3, temperature=1.0, finish_reason="stop")
        for i in range(len(rewards))
    ]
    return Rollouts([Problem("p", "a")], generations, np.array([rewards], np.float32), weight_version=3)


def test_responses_without_a_reward_are_left_out() -> None:
    kept = train_sequences(rollouts(1.0, float("nan"), 0.0), np.array([[0.7, 0.0, -0.7]], np.float32))
    assert [(int(sequence.tokens[0]), sequence.advantage) for sequence in kept] == [(0, pytest.approx(0.7)), (2, pytest.approx(-0.7))]
    assert all(sequence.learner_old_logp is None for sequence in kept)


def test_no_reward_at_all_is_an_error() -> None:
    with pytest.raises(RewardError, match="None for all 2 responses"):
        train_sequences(rollouts(float("nan"), float("nan")), np.zeros((1, 2), np.float32))
