"""Every advantage against a loop over its definition in float64."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from hetero_rl.algorithm.advantage import advantages
from hetero_rl.algorithm.kinds import ADVANTAGES, AdvantageKind

NAN = float("nan")


def reference(kind: AdvantageKind, rewards: list[list[float]]) -> list[list[float]]:
    """The table of advantage.py, one response after the other; all rewards are given and no group is flat."""
    everything = [r for group in rewards for r in group]
    centred = [r - statistics.mean(group) for group in rewards for r in group]
    made = []
    for group in rewards:
        row = []
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            row.append(
                {
                    "grpo": (reward - statistics.mean(group)) / statistics.stdev(group),
                    "dr_grpo": reward - statistics.mean(group),
                    "rloo": reward - statistics.mean(others),
                    "reinforce_pp": (reward - statistics.mean(everything)) / statistics.stdev(everything),
                    "reinforce_pp_baseline": (reward - statistics.mean(group)) / statistics.stdev(centred),
                }[kind]
            )
        made.append(row)
    return made


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_against_the_definition(kind: AdvantageKind) -> None:
    rewards = np.random.default_rng(0).normal(0.4, 1.0, (5, 6))
    np.testing.assert_allclose(advantages(kind, torch.from_numpy(rewards)).numpy(), reference(kind, rewards.tolist()), atol=1e-5)


def test_closed_form() -> None:
    expected = 0.5 / math.sqrt(1 / 3)
    assert advantages("grpo", torch.tensor([[1.0, 0.0, 0.0, 1.0]])).tolist() == [
        pytest.approx([expected, -expected, -expected, expected], rel=1e-5)
    ]


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_equal_rewards_teach_nothing(kind: AdvantageKind) -> None:
    """0.1 has no exact mean in float32: what is left is rounding, which a division would blow up."""
    assert advantages(kind, torch.full((2, 7), 0.1)).abs().max() == 0


@pytest.mark.parametrize("kind", [kind for kind in ADVANTAGES if kind != "reinforce_pp"])
def test_a_flat_group_beside_others_teaches_nothing(kind: AdvantageKind) -> None:
    made = advantages(kind, torch.tensor([[1.0, 0.0, 1.0], [0.1, 0.1, 0.1]]))
    assert made[1].tolist() == [0.0, 0.0, 0.0]
    assert made[0].abs().min() > 0


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_dropped_responses_leave_their_group(kind: AdvantageKind) -> None:
    with_drop = advantages(kind, torch.tensor([[1.0, 0.0, NAN, 0.0]]))
    without = advantages(kind, torch.tensor([[1.0, 0.0, 0.0]]))
    assert with_drop[0, [0, 1, 3]].tolist() == without[0].tolist()
    assert with_drop[0, 2] == 0


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_nothing_to_compare_with(kind: AdvantageKind) -> None:
    assert advantages(kind, torch.full((1, 3), NAN)).tolist() == [[0.0, 0.0, 0.0]]
    assert advantages(kind, torch.tensor([[5.0, NAN, NAN]])).tolist() == [[0.0, 0.0, 0.0]]


def test_rloo_is_unbiased() -> None:
    """E[A grad log p] over all pairs of two responses is the gradient of the expected reward; GRPO's is not."""
    probability, reward = np.array([0.7, 0.3]), torch.tensor([1.0, 0.0], dtype=torch.float64)
    score = np.array([[0.3, -0.3], [-0.7, 0.7]])  # grad log p of each response on two logits
    exact = (probability[:, None] * reward.numpy()[:, None] * score).sum(0)
    mean = np.zeros(2)
    for first in range(2):
        for second in range(2):
            made = advantages("rloo", reward[[first, second]][None])[0].numpy()
            mean += probability[first] * probability[second] * (made[0] * score[first] + made[1] * score[second]) / 2
    np.testing.assert_allclose(mean, exact, atol=1e-9)


def test_unknown_kinds_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"'gae'.*grpo, dr_grpo, rloo"):
        advantages("gae", torch.zeros(1, 2))  # type: ignore[arg-type]
