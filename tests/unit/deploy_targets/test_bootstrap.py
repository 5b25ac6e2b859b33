"""Intervals: against resamples drawn one by one, in closed form where there is one, and whether they cover the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest

from deploy_targets import bootstrap
from deploy_targets.bootstrap import Measure, largest, mean, measure, quantile, ratio, ratios, resample_counts, tail_level

RNG = np.random.default_rng(3)
LENGTHS = RNG.integers(1, 30, size=25)
SEQUENCE = np.repeat(np.arange(25), LENGTHS)
VALUES = RNG.exponential(size=len(SEQUENCE)) + np.repeat(RNG.exponential(size=25), LENGTHS)


def resampled_values(counts: np.ndarray) -> np.ndarray:
    """The tokens of one resample, each as often as its sequence was drawn."""
    return np.repeat(VALUES, counts[SEQUENCE].astype(int))


def test_resamples_are_draws_with_replacement() -> None:
    counts = resample_counts(25)
    assert counts.shape == (bootstrap.NUM_RESAMPLES, 25)
    assert (counts.sum(1) == 25).all()
    assert counts.mean() == 1
    assert counts.var() == pytest.approx(1 - 1 / 25, rel=0.05)
    assert abs(np.corrcoef(counts[:, 0], counts[:, 1])[0, 1] + 1 / 24) < 0.08


def test_equal_input_gives_the_equal_interval() -> None:
    first = mean(VALUES, SEQUENCE, 25)
    resample_counts.cache_clear()
    assert mean(VALUES, SEQUENCE, 25) == first


def test_the_mean_and_its_replicates_are_those_of_the_tokens() -> None:
    sums = np.stack([np.bincount(SEQUENCE, VALUES), np.bincount(SEQUENCE)], axis=1).astype(float)
    replicates = ratio(resample_counts(25) @ sums)
    for index in (0, 7, 1999):
        assert replicates[index] == pytest.approx(resampled_values(resample_counts(25)[index]).mean(), rel=1e-12)
    assert mean(VALUES, SEQUENCE, 25).value == pytest.approx(VALUES.mean(), rel=1e-12)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_quantiles_are_exactly_those_of_every_resample(q: float) -> None:
    quantiles = [np.quantile(resampled_values(counts), q, method="inverted_cdf") for counts in resample_counts(25)]
    tail = tail_level(25, 0.95)
    expected = [np.quantile(quantiles, level, method="inverted_cdf") for level in (tail, 1 - tail)]
    found = quantile(VALUES, SEQUENCE, 25, q)
    assert found == Measure(np.quantile(VALUES, q, method="inverted_cdf"), *expected, 25)


def test_quantiles_of_tied_values() -> None:
    values = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert quantile(values, np.arange(6), 6, 0.5).value == 0
    assert quantile(values, np.arange(6), 6, 0.51).value == 1
    assert quantile(np.zeros(6), np.arange(6), 6, 0.99) == Measure(0, 0, 0, 6)


def test_the_largest_value_has_the_interval_of_its_resamples() -> None:
    tops = [resampled_values(counts).max() for counts in resample_counts(25)]
    found = largest(VALUES, SEQUENCE, 25)
    assert found.value == found.high == VALUES.max()
    assert found.low is not None
    beyond = np.mean(np.array(tops) < found.low)
    assert beyond <= tail_level(25, 0.95) + 0.01
    exact = (np.searchsorted(np.sort([VALUES[s == SEQUENCE].max() for s in range(25)]), found.low, side="right") / 25) ** 25
    assert exact >= tail_level(25, 0.95)


def test_levels_are_students_beyond_the_normal_ones() -> None:
    """Quantiles of Student's t at 97.5 %, from tables; the level of an interval over very many sequences is the plain one."""
    for freedom, quantile_975 in {3: 3.182, 7: 2.365, 15: 2.131, 31: 2.040, 199: 1.972}.items():
        assert bootstrap._student_quantile(0.975, freedom) == pytest.approx(quantile_975, rel=0.02 if freedom == 3 else 1e-3)
    assert tail_level(10**6, 0.95) == pytest.approx(0.025, rel=1e-4)
    assert tail_level(8, 0.95) < 0.01


def test_one_sequence_has_a_value_and_no_interval() -> None:
    one = np.array([1.0, 3.0]), np.zeros(2, int), 1
    for measured in (mean(*one), quantile(*one, 0.5), largest(*one)):
        assert measured.value is not None
        assert (measured.low, measured.high, measured.num_sequences) == (None, None, 1)


def test_nothing_has_no_value() -> None:
    none = np.empty(0), np.empty(0, int), 0
    for measured in (mean(*none), quantile(*none, 0.5), largest(*none)):
        assert measured == Measure(None, None, None, 0)


def test_an_infinite_value_is_its_own_interval() -> None:
    """One of 25 sequences has it; resamples without that one are finite, and say nothing about the mean of all."""
    values = np.where(SEQUENCE == 4, np.inf, VALUES)
    assert mean(values, SEQUENCE, 25) == Measure(math.inf, math.inf, math.inf, 25)


def test_resamples_without_a_value_are_left_out() -> None:
    """A ratio whose denominator is zero where only the other sequences were drawn."""
    sums = np.zeros((12, 2))
    sums[:2] = [[1.0, 2.0], [3.0, 2.0]]
    measured = measure(ratio, sums)
    assert measured.value == 1
    assert measured.low is not None
    assert measured.high is not None
    assert 0.5 <= measured.low < 1 < measured.high <= 1.5


def test_ratios_are_those_measured_one_by_one() -> None:
    numerators, denominators = RNG.uniform(size=(25, 3)), RNG.integers(1, 9, size=(25, 3)).astype(float)
    pairs = np.stack([numerators, denominators], axis=2)
    for together, alone in zip(ratios(numerators, denominators), (measure(ratio, pairs[:, column]) for column in range(3)), strict=True):
        assert astuple(together) == pytest.approx(astuple(alone), rel=1e-12)
    denominators[2:, 1] = numerators[2:, 1] = 0
    denominators[:, 2] = numerators[:, 2] = 0
    few = ratios(numerators, denominators)[1:]
    assert few[0].num_sequences == 2
    assert few[0].low == min(numerators[:2, 1] / denominators[:2, 1])
    assert few[1] == Measure(None, None, None, 0)


def test_without_a_confidence_there_is_no_interval() -> None:
    for measured in (mean(VALUES, SEQUENCE, 25, None), quantile(VALUES, SEQUENCE, 25, 0.5, None), largest(VALUES, SEQUENCE, 25, None)):
        assert measured.value is not None
        assert (measured.low, measured.high) == (None, None)
    assert mean(VALUES, SEQUENCE, 25, None).value == mean(VALUES, SEQUENCE, 25).value


DRAWS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "normal": (lambda rng, n: rng.normal(1, 0.4, n), 1.0),
    "skewed": (lambda rng, n: rng.gamma(2, 0.5, n), 1.0),
    "share": (lambda rng, n: rng.random(n) < 0.3, 0.3),
}


@pytest.mark.parametrize("num_sequences", [32, 128])
@pytest.mark.parametrize("kind", DRAWS)
def test_intervals_of_ratios_cover_the_truth(kind: str, num_sequences: int) -> None:
    """500 samples of sequences of unequal length; the tokens of a sequence are alike. Fewer than 90 % cannot be chance (p < 1e-6)."""
    draw, truth = DRAWS[kind]
    rng, missed = np.random.default_rng(11), np.zeros(2)
    for _ in range(500):
        lengths = rng.integers(5, 40, num_sequences)
        measured = measure(ratio, np.stack([draw(rng, num_sequences) * lengths, lengths], axis=1).astype(float))
        assert measured.low is not None
        assert measured.high is not None
        missed += [measured.low > truth, measured.high < truth]
    assert 0.90 <= 1 - missed.sum() / 500 <= 0.99
    assert missed.max() / 500 <= 0.065


@pytest.mark.parametrize(("q", "truth"), [(0.5, math.log(2)), (0.99, math.log(100))])
def test_intervals_of_quantiles_cover_the_truth(q: float, truth: float) -> None:
    """100 samples of 100 sequences of 40 independent exponential tokens, whose quantiles are -log(1 - q)."""
    rng, covered = np.random.default_rng(12), 0
    sequence = np.repeat(np.arange(100), 40)
    for _ in range(100):
        measured = quantile(rng.exponential(size=4000), sequence, 100, q)
        assert measured.low is not None
        assert measured.high is not None
        covered += measured.low <= truth <= measured.high
    assert 0.88 <= covered / 100 <= 1
