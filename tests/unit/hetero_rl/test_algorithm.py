"""Every formula against a closed form or an independent derivation in float64, every gradient against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deploy_targets.errors import EngineError
from hetero_rl.algorithm.advantage import group_advantages
from hetero_rl.algorithm.kinds import GreyBoxForm
from hetero_rl.algorithm.losses import clip_fraction, ppo_clip_loss
from hetero_rl.algorithm.signals import advantage_side, grey_box_cost, grey_box_kl, grey_box_sampled, grey_box_top, loss_side_cost
from hetero_rl.algorithm.tolerance import Floor, measure_floor, remeasured_floor, tolerance_from

NAN = float("nan")


def logps(*probabilities: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_(grad)


class TestAdvantage:
    def test_closed_form(self) -> None:
        advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
        expected = 0.5 / math.sqrt(1 / 3)
        assert advantages.tolist() == [pytest.approx([expected, -expected, -expected, expected], rel=1e-5)]

    def test_equal_rewards_teach_nothing(self) -> None:
        assert group_advantages(torch.full((2, 4), 0.1)).abs().max() == 0

    def test_without_std_is_centred(self) -> None:
        assert group_advantages(torch.tensor([[3.0, 1.0]]), normalize_std=False).tolist() == [[1.0, -1.0]]

    def test_dropped_responses_leave_the_group(self) -> None:
        with_drop = group_advantages(torch.tensor([[1.0, 0.0, NAN, 0.0]]))
        without = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]))
        assert with_drop[0, [0, 1, 3]].tolist() == without[0].tolist()
        assert with_drop[0, 2] == 0

    def test_all_dropped(self) -> None:
        assert group_advantages(torch.full((1, 3), NAN)).tolist() == [[0.0, 0.0, 0.0]]


class TestPolicyLoss:
    def test_on_policy_gradient_is_the_score_function(self) -> None:
        logp = logps(0.3, 0.6, grad=True)
        advantage = torch.tensor([2.0, -1.0], dtype=torch.float64)
        ppo_clip_loss(logp, logp.detach(), advantage, 1.0, 0.2, 0.28).sum().backward()
        assert logp.grad is not None
        assert logp.grad.tolist() == pytest.approx((-advantage).tolist())

    @pytest.mark.parametrize(
        ("ratio", "advantage", "clipped"), [(1.5, 1.0, True), (1.5, -1.0, False), (0.5, -1.0, True), (0.5, 1.0, False), (1.25, 1.0, False)]
    )
    def test_clip(self, ratio: float, advantage: float, clipped: bool) -> None:
        old = logps(0.4)
        logp = (old + math.log(ratio)).requires_grad_(True)
        a = torch.tensor([advantage], dtype=torch.float64)
        loss = ppo_clip_loss(logp, old, a, 1.0, 0.2, 0.28)
        loss.sum().backward()
        assert logp.grad is not None
        assert (logp.grad.abs().item() == 0) is clipped
        assert clip_fraction(logp.detach(), old, a, 0.2, 0.28).item() == float(clipped)
        bound = ratio if not clipped else (1.28 if ratio > 1 else 0.8)
        assert loss.item() == pytest.approx(-bound * advantage)


class TestSignals:
    def test_grey_box_value_and_zero(self) -> None:
        twin = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
        learner = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
        p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
        assert grey_box_kl(twin, learner).item() == pytest.approx(float((p * np.log(p / q)).sum()))
        assert grey_box_kl(twin + 3.0, twin).abs().item() < 1e-12

    def test_grey_box_gradient_reaches_both_sides(self) -> None:
        generator = torch.Generator().manual_seed(0)
        twin = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
        learner = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
        assert torch.autograd.gradcheck(grey_box_kl, (twin, learner))
        grey_box_kl(twin, learner).sum().backward()
        assert twin.grad is not None
        assert learner.grad is not None
        # d KL(m || p) / d learner logits = p - m, an independent derivation.
        assert torch.allclose(learner.grad, learner.detach().softmax(-1) - twin.detach().softmax(-1))
        assert twin.grad.abs().max() > 0

    @pytest.mark.parametrize("form", ["kl", "top", "sampled"])
    def test_every_form_has_the_gradient_of_both_sides(self, form: GreyBoxForm) -> None:
        generator = torch.Generator().manual_seed(0)
        twin, learner = (torch.randn(6, 40, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
        targets = torch.arange(6)
        assert torch.autograd.gradcheck(lambda a, b: grey_box_cost(form, a, b, targets), (twin, learner))

    def test_the_top_tokens_bound_the_kl_from_below_and_meet_it_when_they_are_all(self) -> None:
        generator = torch.Generator().manual_seed(0)
        twin, learner = (3 * torch.randn(50, 40, dtype=torch.float64, generator=generator) for _ in range(2))
        whole = grey_box_kl(twin, learner)
        fewer, more = grey_box_top(twin, learner, 4), grey_box_top(twin, learner, 16)
        assert (fewer <= more + 1e-12).all()
        assert (more <= whole + 1e-12).all()
        assert (more / whole).mean() > 0.9
        torch.testing.assert_close(grey_box_top(twin, learner, 39), whole)
        p, q = twin[0].softmax(-1).numpy(), learner[0].softmax(-1).numpy()
        top = np.argsort(-p)[:4]
        rest = 1 - p[top].sum(), 1 - q[top].sum()
        assert fewer[0].item() == pytest.approx((p[top] * np.log(p[top] / q[top])).sum() + rest[0] * np.log(rest[0] / rest[1]))

    def test_the_sampled_form_is_abs_dp(self) -> None:
        twin, learner = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.5, 0.3, 0.2]]).log()
        assert grey_box_sampled(twin, learner, torch.tensor([1])).item() == pytest.approx(0.1)

    def test_loss_side_gradient_is_the_learners_alone(self) -> None:
        learner, engine = logps(0.6, 0.2, grad=True), logps(0.5, 0.5, grad=True)
        loss_side_cost(learner, engine).sum().backward()
        assert learner.grad is not None
        assert learner.grad.tolist() == pytest.approx([0.6, -0.2])
        assert engine.grad is None

    def test_advantage_side_has_no_gradient(self) -> None:
        learner = logps(0.6, grad=True)
        shaped = advantage_side(torch.tensor([1.0], dtype=torch.float64), learner, logps(0.5), 2.0)
        assert shaped.item() == pytest.approx(0.8)
        assert not shaped.requires_grad


class TestTolerance:
    def test_floor_is_the_token_mean(self) -> None:
        floor = measure_floor([np.array([0.1, 0.3], np.float32), np.array([0.2, np.nan], np.float32)])
        assert floor.mean == pytest.approx(0.2)
        assert floor.num_tokens == 3
        assert floor.low <= floor.mean <= floor.high

    def test_interval_covers_the_truth(self) -> None:
        generator = np.random.default_rng(0)
        hits = 0
        for trial in range(100):
            gaps = [generator.exponential(0.1, size=20).astype(np.float32) for _ in range(60)]
            floor = measure_floor(gaps, seed=trial)
            hits += floor.low <= 0.1 <= floor.high
        assert hits >= 85

    def test_nothing_finite(self) -> None:
        with pytest.raises(EngineError, match="no floor"):
            measure_floor([np.array([np.nan], np.float32)])

    def test_units(self) -> None:
        floor = Floor(0.02, 0.01, 0.03, 1000)
        assert tolerance_from(0.7, "floor", floor) == pytest.approx(0.014)
        assert tolerance_from(0.7, "absolute", floor) == 0.7
        assert tolerance_from(0.7, "floor", floor, least=0.05) == 0.05
        assert tolerance_from(0.01, "absolute", floor, least=0.05) == 0.01

    @pytest.mark.parametrize(
        ("low", "high", "moved"), [(0.029, 0.05, False), (0.031, 0.05, True), (0.001, 0.011, False), (0.001, 0.009, True)]
    )
    def test_a_second_floor_counts_only_beyond_the_noise(self, low: float, high: float, moved: bool) -> None:
        old, new = Floor(0.02, 0.01, 0.03, 1000), Floor((low + high) / 2, low, high, 1000)
        assert remeasured_floor(old, new) == (new if moved else old)
