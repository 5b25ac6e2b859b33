"""Every measure against its definition in float64 numpy, its gradient against the derivative worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hetero_rl.algorithm.discrepancy import (
    AGGREGATIONS,
    MEASURES,
    Aggregation,
    GapSums,
    Measure,
    MeasureSums,
    abs_dp,
    discrepancy,
    k3,
    masked_mean,
    split_gap,
)
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
    with pytest.raises(ValueError, match=r"'median'.*token_mean, sequence_mean, max"):
        MeasureSums().value("median")  # type: ignore[arg-type]


def test_masked_mean_ignores_nan_outside() -> None:
    assert masked_mean(torch.tensor([1.0, NAN, 3.0]), torch.tensor([True, False, True])) == 2.0
    assert masked_mean(torch.tensor([NAN]), torch.tensor([False])) == 0.0


class TestAggregations:
    def sums(self, lengths: list[int], values: Array, mask: NDArray[np.bool_]) -> MeasureSums:
        return MeasureSums.of(torch.from_numpy(values), torch.from_numpy(mask), Segments.of(lengths))

    def test_against_numpy(self) -> None:
        generator = np.random.default_rng(1)
        lengths, values, mask = [5, 1, 7, 3], generator.normal(size=16), generator.random(16) < 0.7
        mask[5] = False  # The second response has no counted token at all.
        parts = [(v[m]) for v, m in zip(np.split(values, [5, 6, 13]), np.split(mask, [5, 6, 13]), strict=True)]
        values[~mask] = NAN
        sums = self.sums(lengths, values, mask)
        assert sums.value("token_mean") == pytest.approx(np.concatenate(parts).mean(), abs=1e-6)
        assert sums.value("sequence_mean") == pytest.approx(np.mean([part.mean() for part in parts if part.size]), abs=1e-6)
        assert sums.value("max") == pytest.approx(np.concatenate(parts).max(), abs=1e-6)

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_no_aggregate_depends_on_the_cut(self, aggregation: Aggregation) -> None:
        values, mask = np.array([0.1, 0.5, 0.2, -0.3, 0.9]), np.array([True, True, False, True, True])
        whole = self.sums([2, 1, 2], values, mask)
        parts = self.sums([2], values[:2], mask[:2]) + self.sums([1, 2], values[2:], mask[2:])
        assert parts.value(aggregation) == pytest.approx(whole.value(aggregation))

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_nothing_counted_is_nan(self, aggregation: Aggregation) -> None:
        assert math.isnan(self.sums([2], np.array([NAN, NAN]), np.array([False, False])).value(aggregation))
        assert math.isnan(MeasureSums().value(aggregation))

    def test_a_part_without_tokens_adds_nothing(self) -> None:
        some = self.sums([2], np.array([-0.5, -0.1]), np.array([True, True]))
        assert some + MeasureSums() == some


class TestSplitGap:
    def test_engine_and_staleness_stay_apart(self) -> None:
        now, old, engine = logps(0.6, 0.5), logps(0.5, 0.5), logps(0.3, 0.45)
        gap = split_gap(now, old, engine)
        assert gap.mean(gap.engine_gap) == pytest.approx((0.2 + 0.05) / 2)
        assert gap.mean(gap.staleness_gap) == pytest.approx(0.1 / 2)

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
        assert dirty.mean(dirty.engine_gap) == clean.mean(clean.engine_gap)
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
