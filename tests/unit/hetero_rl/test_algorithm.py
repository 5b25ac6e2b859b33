"""Signals and tolerance: every formula against a closed form or an independent derivation in float64, every gradient against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploy_targets.errors import EngineError, UsageError
from hetero_rl.algorithm.discrepancy import abs_dp
from hetero_rl.algorithm.kinds import AdvantageForm, GreyBoxForm, Signal
from hetero_rl.algorithm.segments import Segments
from hetero_rl.algorithm.signals import (
    advantage_cost,
    advantage_side,
    grey_box_cost,
    grey_box_kl,
    grey_box_sampled,
    grey_box_top,
    group_costs,
    loss_side_cost,
)
from hetero_rl.algorithm.tolerance import Floor, mean_gap, measure_floor, out_of_reach, tolerance_from

NAN = float("nan")


def logps(*probabilities: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_(grad)


class TestSignals:
    def test_grey_box_value_and_zero(self) -> None:
        twin = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
        learner = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
        p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
        assert grey_box_kl(twin, learner).item() == pytest.approx(float((p * np.log(p / q)).sum()))
        assert grey_box_kl(twin, twin).abs().item() < 1e-12

    def test_grey_box_gradient_reaches_both_sides(self) -> None:
        generator = torch.Generator().manual_seed(0)
        twin = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
        learner = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a, b: grey_box_kl(a.log_softmax(-1), b.log_softmax(-1)), (twin, learner))
        grey_box_kl(twin.log_softmax(-1), learner.log_softmax(-1)).sum().backward()
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
        assert torch.autograd.gradcheck(lambda a, b: grey_box_cost(form, a.log_softmax(-1), b.log_softmax(-1), targets), (twin, learner))

    def test_the_top_tokens_bound_the_kl_from_below_and_meet_it_when_they_are_all(self) -> None:
        generator = torch.Generator().manual_seed(0)
        twin, learner = ((3 * torch.randn(50, 40, dtype=torch.float64, generator=generator)).log_softmax(-1) for _ in range(2))
        whole = grey_box_kl(twin, learner)
        fewer, more = grey_box_top(twin, learner, 4), grey_box_top(twin, learner, 16)
        assert (fewer <= more + 1e-12).all()
        assert (more <= whole + 1e-12).all()
        assert (more / whole).mean() > 0.9
        torch.testing.assert_close(grey_box_top(twin, learner, 39), whole)
        p, q = twin[0].exp().numpy(), learner[0].exp().numpy()
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
        mask = torch.tensor([True])
        cost = advantage_cost("token", logps(0.6, grad=True), logps(0.5), mask, Segments.of([1]))
        shaped = advantage_side(torch.tensor([1.0], dtype=torch.float64), cost, torch.zeros(1), 2.0)
        assert shaped.item() == pytest.approx(0.8)
        assert not shaped.requires_grad

    @pytest.mark.parametrize(("form", "centers"), [("token_centered", [0.2, 0.2, 0.5]), ("response_centered", [0.225, 0.225, 0.5])])
    def test_centred_costs_vanish_over_the_group(self, form: AdvantageForm, centers: list[float]) -> None:
        learner, engine, lengths = logps(0.6, 0.5, 0.5, 0.9), logps(0.5, 0.3, 0.2, 0.4), [2, 1, 1]
        mask = torch.tensor([True, True, True, True])
        cost = advantage_cost(form, learner, engine, mask, Segments.of(lengths))
        each = [abs_dp(learner, engine)[part].numpy() for part in (slice(0, 2), slice(2, 3), slice(3, 4))]
        found = group_costs(form, each, ["a", "a", "b"])
        assert found == pytest.approx(centers)
        centered = advantage_side(torch.zeros(4, dtype=torch.float64), cost, torch.tensor([found[0], *found]), 1.0)
        per_response = [centered[:2].mean(), centered[2]] if form == "response_centered" else [centered[:2].sum(), centered[2]]
        assert sum(per_response).item() == pytest.approx(0.0, abs=1e-6)
        assert centered[3].item() == pytest.approx(0.0, abs=1e-6)

    def test_a_response_form_spreads_the_mean(self) -> None:
        mask = torch.tensor([True, False, True])
        cost = advantage_cost("response", logps(0.6, 0.5, 0.9), logps(0.5, 0.1, 0.6), mask, Segments.of([3]))
        assert cost.tolist() == pytest.approx([0.2, 0.2, 0.2])

    def test_tokens_without_an_engine_log_prob_are_no_cost(self) -> None:
        assert group_costs("token_centered", [np.array([0.4, np.nan], np.float32), np.array([np.nan], np.float32)], [0, 1]) == [
            pytest.approx(0.4),
            0.0,
        ]


class TestTolerance:
    def test_floor_is_the_token_mean(self) -> None:
        floor = measure_floor([np.array([0.1, 0.3], np.float32), np.array([0.2, np.nan], np.float32)])
        assert floor.mean == pytest.approx(0.2)
        assert floor.num_tokens == 3
        assert floor.low <= floor.mean <= floor.high

    def test_a_response_counts_as_much_as_the_next(self) -> None:
        gaps = [np.array([0.1, 0.3], np.float32), np.array([0.6], np.float32), np.array([np.nan], np.float32)]
        floor = measure_floor(gaps, aggregation="response")
        assert (floor.mean, floor.num_tokens, floor.num_nonfinite) == (pytest.approx(0.4), 3, 1)
        assert mean_gap(gaps, "response") == floor.mean
        assert mean_gap(gaps, "token") == pytest.approx(1 / 3)

    def test_prompts_are_resampled_not_responses(self) -> None:
        # All responses to a prompt have one gap: eight of them say no more about the floor than one.
        generator = np.random.default_rng(0)
        each = [np.full(10, gap, np.float32) for gap in generator.exponential(0.1, size=40)]
        alone = measure_floor(each)
        eightfold = measure_floor([gap for gap in each for _ in range(8)], group_size=8)
        assert (eightfold.low, eightfold.high) == (pytest.approx(alone.low), pytest.approx(alone.high))

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
        with pytest.raises(UsageError, match=r"no multiple of it is a bound: set constraint\.tolerance_min"):
            tolerance_from(1.0, "floor", Floor(0.0, 0.0, 0.0, 10))

    @pytest.mark.parametrize(
        ("signal", "tolerance", "said"),
        [("loss", 0.02, True), ("advantage", 0.03, True), ("loss", 0.031, False), ("grey_box", 0.004, False), ("off", 0.004, False)],
    )
    def test_a_bound_that_no_update_can_meet_is_named(self, signal: Signal, tolerance: float, said: bool) -> None:
        text = out_of_reach(signal, tolerance, Floor(0.02, 0.01, 0.03, 1000))
        assert bool(text) is said
        assert not said or "not above the floor (95 % interval 0.0100 to 0.0300)" in text
