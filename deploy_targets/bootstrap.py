"""A measured number with its interval: bootstrap over sequences, since the tokens of one sequence are not independent.

Every resample draws the sequences with replacement, and is kept as how often it drew each of them: a measure made of sums over
sequences is then one matrix product for all resamples, and no token is touched twice. The draws are seeded: equal input, equal interval.

Ends of the interval:
    sums, ratios of sums    BCa (Efron 1987, https://doi.org/10.1080/01621459.1987.10478410): percentiles shifted for bias and skewness
    quantiles               percentiles of the quantile of every resample, exactly: it is at most v where the resample has a share of q or
                            more at most v, so that a search for v needs no resample's tokens to be sorted
    largest value           percentiles in closed form: all of a resample lie at or below the i-th of n sequences with probability (i/n)^n.
                            It never reaches beyond what was seen: the upper end is the value itself, and no promise

All levels are those of Hesterberg's expanded percentiles (https://doi.org/10.1080/00031305.2015.1089789, 4.1), which few sequences need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Sums [..., k] -> the measure [...]."""

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
_LEAST_LEVEL = 1e-9
_TRIED_AT_ONCE = 24
"""Values held against all resamples in one matrix product; a bisection would read the resamples once for each."""
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Measure:
    """A measured number, its interval, and the sequences (or problems) both rest on.

    `value` is None where nothing was measured, `low` and `high` are None where there are fewer than two sequences.
    """

    value: float | None
    low: float | None
    high: float | None
    num_sequences: int


def measure(statistic: Statistic, sums: Floats, confidence: float | None = CONFIDENCE) -> Measure:
    """`statistic` of the totals of `sums` float64 [num_sequences, k], with its BCa interval, or without one where `confidence` is None.

    An infinite value is its own interval: one infinite term makes the mean infinite, however many more are drawn. Resamples on which the
    statistic is undefined (none of the sequences it needs was drawn) are left out.
    """
    num_sequences, total = len(sums), sums.sum(0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = float(statistic(total))
        if confidence is None or num_sequences < 2 or not math.isfinite(value):
            return _without_draws(value, num_sequences)
        replicates, left_out = statistic(resample_counts(num_sequences) @ sums), statistic(total - sums)
    return _drawn(value, replicates, left_out, num_sequences, confidence)


def ratios(numerators: Floats, denominators: Floats) -> list[Measure]:
    """`ratio` of each column of two float64 [num_sequences, k], of the sequences with a positive denominator there; one matrix product."""
    num_columns, totals = numerators.shape[1], (numerators.sum(0), denominators.sum(0))
    counts = (denominators > 0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = totals[0] / totals[1]
        drawn = resample_counts(len(numerators)) @ np.concatenate([numerators, denominators], axis=1)
        replicates, left_out = drawn[:, :num_columns] / drawn[:, num_columns:], (totals[0] - numerators) / (totals[1] - denominators)
    return [
        _drawn(float(value), replicates[:, column], left_out[:, column], int(counts[column]), CONFIDENCE)
        if counts[column] > 1 and math.isfinite(value)
        else _without_draws(float(value), int(counts[column]))
        for column, value in enumerate(values)
    ]


def _without_draws(value: float, num_sequences: int) -> Measure:
    end = value if math.isinf(value) else None
    return Measure(None if math.isnan(value) else value, end, end, num_sequences)


def _drawn(value: float, replicates: Floats, left_out: Floats, num_sequences: int, confidence: float) -> Measure:
    low, high = _bca(value, replicates[np.isfinite(replicates)], left_out[np.isfinite(left_out)], num_sequences, confidence)
    return Measure(value, low, high, num_sequences)


def mean(values: Floats, sequence: NDArray[np.int_], num_sequences: int, confidence: float | None = CONFIDENCE) -> Measure:
    """Mean of `values` [num_tokens] over tokens; token i is of the sequence `sequence[i]` in [0, num_sequences)."""
    sums = np.stack([np.bincount(sequence, values, num_sequences), np.bincount(sequence, minlength=num_sequences).astype(float)], axis=1)
    return measure(ratio, sums, confidence)


def ratio(sums: Floats) -> Floats:
    """The first of two sums over the second."""
    quotient: Floats = sums[..., 0] / sums[..., 1]
    return quotient


def quantile(values: Floats, sequence: NDArray[np.int_], num_sequences: int, q: float, confidence: float | None = CONFIDENCE) -> Measure:
    """The smallest of `values` [num_tokens] with a share of `q` or more at or below it; sequences as in `mean`."""
    if not len(values):
        return Measure(None, None, None, num_sequences)
    order = np.argsort(values, kind="stable")
    values, sequence = values[order], sequence[order]
    value = float(values[math.ceil(q * len(values) - 1e-9) - 1])
    if confidence is None or num_sequences < 2:
        return Measure(value, None, None, num_sequences)
    counts = resample_counts(num_sequences)
    wanted = q * (counts @ np.bincount(sequence, minlength=num_sequences)) - 1e-9 * len(values)

    def lowest(level: float) -> float:
        """The smallest value that is at or above the quantile of a share `level` of all resamples."""
        begin, end = 0, len(values) - 1
        while begin < end:
            tried = np.unique(np.linspace(begin, end - 1, _TRIED_AT_ONCE).astype(int))
            at_most = counts @ np.stack([np.bincount(sequence[: index + 1], minlength=num_sequences) for index in tried], axis=1)
            reached = np.flatnonzero((at_most >= wanted[:, None]).mean(0) >= level)
            first = int(reached[0]) if len(reached) else len(tried)
            begin, end = tried[first - 1] + 1 if first else begin, tried[first] if len(reached) else end
        return float(values[begin])

    tail = tail_level(num_sequences, confidence)
    return Measure(value, lowest(tail), lowest(1 - tail), num_sequences)


def largest(values: Floats, sequence: NDArray[np.int_], num_sequences: int, confidence: float | None = CONFIDENCE) -> Measure:
    """The largest of `values` [num_tokens]; sequences as in `mean`. Its interval reaches down only."""
    if not len(values):
        return Measure(None, None, None, num_sequences)
    tops = np.full(num_sequences, -np.inf)
    np.maximum.at(tops, sequence, values)
    tops.sort()
    if confidence is None or num_sequences < 2:
        return Measure(float(tops[-1]), None, None, num_sequences)
    reached = (np.arange(1, num_sequences + 1) / num_sequences) ** num_sequences
    tail = tail_level(num_sequences, confidence)
    low, high = tops[np.searchsorted(reached, [tail, 1 - tail]).clip(max=num_sequences - 1)]
    return Measure(float(tops[-1]), float(low), float(high), num_sequences)


@lru_cache(maxsize=4)
def resample_counts(num_sequences: int) -> Floats:
    """How often each resample drew each sequence: float64 [NUM_RESAMPLES, num_sequences], the same for equal `num_sequences`."""
    draws = np.random.default_rng(0).integers(num_sequences, size=(NUM_RESAMPLES, num_sequences))
    draws += np.arange(NUM_RESAMPLES)[:, None] * num_sequences
    counts = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape).astype(np.float64)
    counts.setflags(write=False)
    return counts


def tail_level(num_sequences: int, confidence: float) -> float:
    """The percentile to take for one end of an interval of `confidence`: Phi(-sqrt(n / (n - 1)) t_(n - 1)), a little beyond (1 - c) / 2."""
    freedom = num_sequences - 1
    level = _NORMAL.cdf(-math.sqrt(num_sequences / freedom) * _student_quantile((1 + confidence) / 2, freedom))
    return max(level, _LEAST_LEVEL)


def _student_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5); 2 % short at 3 degrees of freedom."""
    z = _NORMAL.inv_cdf(level)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def _bca(value: float, replicates: Floats, left_out: Floats, num_sequences: int, confidence: float) -> tuple[float, float]:
    below = (replicates < value).mean() + (replicates == value).mean() / 2
    bias = _NORMAL.inv_cdf(min(max(float(below), 1 / len(replicates)), 1 - 1 / len(replicates)))
    influence = left_out.mean() - left_out
    spread = float((influence**2).sum())
    skewness = float((influence**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    tail = _NORMAL.inv_cdf(tail_level(num_sequences, confidence))
    low, high = (_NORMAL.cdf(bias + (bias + z) / max(1 - skewness * (bias + z), 1e-9)) for z in (tail, -tail))
    return float(np.quantile(replicates, low, method="lower")), float(np.quantile(replicates, high, method="higher"))


def binned_sums(values: Floats, sequence: NDArray[np.int_], bins: NDArray[np.int_], num_sequences: int, num_bins: int) -> Floats:
    """Sums of `values` [num_tokens] by sequence and bin: float64 [num_sequences, num_bins]."""
    sums: Floats = np.bincount(sequence * num_bins + bins, values, num_sequences * num_bins).astype(np.float64)
    return sums.reshape(num_sequences, num_bins)
