"""Every measure against its definition in float64 numpy, its gradient against the derivative worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hetero_rl.algorithm.discrepancy import (
    GapSums,
    abs_dp,
    discrepancy,
    k3,
    token_gap,
)
from hetero_rl.algorithm.discrepancy import split_gap as split_by_response
from hetero_rl.algorithm.kinds import MEASURES, Measure
from hetero_rl.algorithm.segments import Segments

NAN = float("nan")
Array = NDArray[np.float64]

# From p = pi(y) and q = mu(y), not from their logs: (value, derivative with respect to log p).
DEFINITIONS: dict[Measure, tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]]] = {
    "abs_dp": (lambda p, q: np.maximum(p - q, q - p), lambda p, q: np.where(p > q, p, -p)),
    "abs_log_ratio": (lambda p, q: np.log(np.maximum(p, q) / np.minimum(p, q)), lambda p, q: np.where(p > q, 1.0, -1.0)),
    "k1": (lambda p, q: np.log(q / p), lambda p, q: -np.ones_like(p)),
    "k2": (lambda p, q: 0.5 * np.log(q / p) ** 2, lambda p, q: np.log(p / q)),
    "k3": (lambda p, q: p / q - 1 + np.log(q / p), lambda p, q: p / q - 1),
    "chi2": (lambda p, q: ((p - q) / q) ** 2, lambda p, q: 2 * (p / q - 1) * p / q),
}


def logps(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def split_gap(now: torch.Tensor, old: torch.Tensor, engine: torch.Tensor, measure: Measure = "abs_dp") -> GapSums:
    """Of tokens that are all of one response."""
    return split_by_response(now, old, engine, Segments.of([len(now)]), measure)


def random_probabilities(seed: int, size: int = 200) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    return generator.uniform(0.02, 0.98, size), generator.uniform(0.02, 0.98, size)


def test_every_measure_has_a_definition_here() -> None:
    assert set(DEFINITIONS) == set(MEASURES)


@pytest.mark.parametrize("measure", MEASURES)
def test_value_and_gradient_against_numpy(measure: Measure) -> None:
    p, q = random_probabilities(0)
    learner = torch.from_numpy(p).log().requires_grad_(True)
    values = discrepancy(measure, learner, torch.from_numpy(q).log())
    values.sum().backward()
    value, derivative = DEFINITIONS[measure]
    np.testing.assert_allclose(values.detach().numpy(), value(p, q), atol=1e-6, rtol=1e-6)
    assert learner.grad is not None
    np.testing.assert_allclose(learner.grad.numpy(), derivative(p, q), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_equal_log_probs_have_no_gap(measure: Measure) -> None:
    logp = logps(0.9, 0.2, 0.01).float()
    assert discrepancy(measure, logp, logp).abs().max() == 0


@pytest.mark.parametrize("measure", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_for_the_kl(measure: Measure) -> None:
    engine, learner = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    values = discrepancy(measure, torch.from_numpy(learner).log(), torch.from_numpy(engine).log()).numpy()
    assert (engine * values).sum() == pytest.approx((engine * np.log(engine / learner)).sum())


def test_k2_differs_from_the_kl_by_the_third_order() -> None:
    engine, errors = np.array([0.7, 0.2, 0.1]), []
    for size in (0.1, 0.05):
        learner = engine + size * np.array([-0.2, 0.1, 0.1])
        k2 = discrepancy("k2", torch.from_numpy(learner).log(), torch.from_numpy(engine).log()).numpy()
        errors.append(abs((engine * k2).sum() - (engine * np.log(engine / learner)).sum()))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.15)


def test_chi2_is_unbiased_for_the_variance_of_the_ratio() -> None:
    engine, learner = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    values = discrepancy("chi2", torch.from_numpy(learner).log(), torch.from_numpy(engine).log()).numpy()
    assert (engine * values).sum() == pytest.approx((learner**2 / engine).sum() - 1)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"'kl'.*abs_dp, abs_log_ratio, k1, k2, k3, chi2"):
        discrepancy("kl", logps(0.5), logps(0.5))  # type: ignore[arg-type]


def test_token_gap_is_nan_where_the_engine_gave_nothing() -> None:
    learner, engine = (np.log(np.array(p, np.float32)) for p in ([0.6, 0.5, 0.2], [0.3, 0.45, 0.4]))
    engine[1] = np.inf
    np.testing.assert_allclose(token_gap(learner, engine), [0.3, NAN, 0.2], rtol=1e-6)
    np.testing.assert_allclose(token_gap(learner, engine, "k1"), [-math.log(2), NAN, math.log(2)], rtol=1e-6)


class TestByResponse:
    def gap(self, lengths: list[int], learner: Array, engine: Array) -> GapSums:
        logps = (torch.from_numpy(p).log() for p in (learner, learner, engine))
        return split_by_response(*logps, Segments.of(lengths), aggregation="response")

    def test_is_the_mean_of_the_means(self) -> None:
        (learner, engine), lengths = random_probabilities(1, 16), [5, 1, 7, 3]
        engine[5] = NAN  # The second response has no counted token at all.
        engine[7] = NAN
        parts = [part[np.isfinite(part)] for part in np.split(np.abs(learner - engine), [5, 6, 13])]
        gap = self.gap(lengths, learner, engine)
        assert gap.mean_engine_gap == pytest.approx(np.mean([part.mean() for part in parts if part.size]))
        assert (gap.num_gaps, gap.num_tokens, gap.mean_staleness_gap) == (3, 14, 0)

    def test_does_not_depend_on_the_cut(self) -> None:
        learner, engine = random_probabilities(5, 6)
        parts = self.gap([2], learner[:2], engine[:2]) + self.gap([1, 3], learner[2:], engine[2:])
        assert parts.mean_engine_gap == pytest.approx(self.gap([2, 1, 3], learner, engine).mean_engine_gap)

    def test_nothing_counted_is_nan(self) -> None:
        nothing = self.gap([2], np.array([0.5, 0.5]), np.array([NAN, NAN]))
        assert math.isnan(nothing.mean_engine_gap)
        assert math.isnan(nothing.mean_staleness_gap)


class TestSplitGap:
    def test_engine_and_staleness_stay_apart(self) -> None:
        now, old, engine = logps(0.6, 0.5), logps(0.5, 0.5), logps(0.3, 0.45)
        gap = split_gap(now, old, engine)
        assert gap.mean_engine_gap == pytest.approx((0.2 + 0.05) / 2)
        assert gap.mean_staleness_gap == pytest.approx(0.1 / 2)

    @pytest.mark.parametrize("measure", MEASURES)
    def test_both_parts_are_in_the_measure(self, measure: Measure) -> None:
        (now, old), (engine, _) = random_probabilities(2), random_probabilities(3)
        gap = split_gap(*(torch.from_numpy(p).log() for p in (now, old, engine)), measure=measure)
        value = DEFINITIONS[measure][0]
        assert gap.engine_gap == pytest.approx(value(old, engine).sum(), rel=1e-6)
        assert gap.staleness_gap == pytest.approx(value(now, old).sum(), rel=1e-6)
        assert gap.kl_k3 == pytest.approx(DEFINITIONS["k3"][0](old, engine).sum(), rel=1e-6)

    @pytest.mark.parametrize("bad", [NAN, float("-inf"), float("inf")])
    def test_nonfinite_engine_logps_leave_mask_and_denominator(self, bad: float) -> None:
        now = logps(0.6, 0.5, 0.9)
        clean = split_gap(now[:2], now[:2], logps(0.3, 0.45))
        dirty = split_gap(now, now, torch.cat([logps(0.3, 0.45), torch.tensor([bad], dtype=torch.float64)]))
        assert (dirty.num_tokens, dirty.num_nonfinite) == (2, 1)
        assert dirty.mean_engine_gap == clean.mean_engine_gap
        assert dirty.mean(dirty.kl_k3) == clean.mean(clean.kl_k3)

    def test_sums_do_not_depend_on_the_cut(self) -> None:
        now, engine = logps(0.6, 0.5, 0.9), logps(0.3, 0.45, 0.8)
        parts = split_gap(now[:1], now[:1], engine[:1]) + split_gap(now[1:], now[1:], engine[1:])
        whole = split_gap(now, now, engine)
        assert parts.engine_gap == pytest.approx(whole.engine_gap)
        assert parts.num_tokens == whole.num_tokens
        assert math.isnan(GapSums().mean(0.0))


def test_the_named_functions_are_the_dispatched_ones() -> None:
    p, q = (torch.from_numpy(values).log() for values in random_probabilities(4))
    assert torch.equal(discrepancy("abs_dp", p, q), abs_dp(p, q))
    assert torch.equal(discrepancy("k3", p, q), k3(p, q))
