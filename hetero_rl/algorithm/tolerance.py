"""The floor: the gap that is there before anything was learned, and the tolerance in its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deploy_targets.errors import EngineError, UsageError
from hetero_rl.algorithm.kinds import Aggregation, Signal


@dataclass(frozen=True, slots=True)
class Floor:
    """Mean gap of the same weights on both machines, with a 95 % interval over prompts."""

    mean: float
    low: float
    high: float
    num_tokens: int
    num_nonfinite: int = 0
    """Tokens without a finite engine log-prob; they are in neither the sum nor the count."""


def mean_gap(gaps: Sequence[NDArray[np.float32]], aggregation: Aggregation) -> float:
    """The mean of per-token `gaps`, one array [num_tokens_i] per response, NaN left out; NaN where nothing is finite."""
    sums, counts = _parts(gaps, aggregation)
    return float(sums.sum() / counts.sum()) if counts.sum() else float("nan")


def measure_floor(
    gaps: Sequence[NDArray[np.float32]],
    *,
    group_size: int = 1,
    aggregation: Aggregation = "token",
    seed: int = 0,
    num_resamples: int = 500,
) -> Floor:
    """The floor from per-token gaps of several responses.

    Args:
        gaps: One float32 array [num_tokens_i] per response; NaN (no engine log-prob) is left out.
        group_size: Responses per prompt, which lie one after the other.
        aggregation: What the mean is over.
        seed: Seed of the bootstrap.
        num_resamples: Bootstrap resamples. Prompts, not tokens, are drawn: responses to one prompt are not independent.

    Raises:
        EngineError: no token has a finite gap.
    """
    sums, counts = _parts(gaps, aggregation)
    num_tokens, num_finite = sum(map(len, gaps)), sum(int(np.isfinite(gap).sum()) for gap in gaps)
    if num_finite == 0:
        raise EngineError(
            f"the engine gave no finite log-prob for any of {num_tokens} sampled tokens, so there is no floor to measure. "
            "Look for overflow: `hetero-rl eval --target bf16-transformers` shows whether the model itself is sound"
        )
    sums, counts = (values.reshape(-1, group_size).sum(axis=1) for values in (sums, counts))
    draws = np.random.default_rng(seed).integers(0, len(sums), (num_resamples, len(sums)))
    means = sums[draws].sum(axis=1) / np.maximum(counts[draws].sum(axis=1), 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Floor(float(sums.sum() / counts.sum()), float(low), float(high), num_finite, num_tokens - num_finite)


def _parts(gaps: Sequence[NDArray[np.float32]], aggregation: Aggregation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each response adds to the numerator and to the denominator of the mean: float64 [num_responses] both."""
    sums = np.array([np.nansum(gap) for gap in gaps], dtype=np.float64)
    counts = np.array([np.isfinite(gap).sum() for gap in gaps], dtype=np.float64)
    return (sums, counts) if aggregation == "token" else (sums / np.maximum(counts, 1), np.minimum(counts, 1))


def tolerance_from(value: float, unit: Literal["floor", "absolute"], floor: Floor, least: float = 0.0) -> float:
    """The bound on the mean gap: `value` times the floor and not below `least`, or `value` itself.

    A target of 8 or more bits has a floor that the arithmetic of another CPU exceeds; nothing is served better by holding it.

    Raises:
        UsageError: the floor is 0, so that no multiple of it is a bound.
    """
    tolerance = max(value * floor.mean, least) if unit == "floor" else value
    if tolerance <= 0.0:
        raise UsageError(
            f"the floor is {floor.mean:g}, and no multiple of it is a bound: set constraint.tolerance_min, or constraint.tolerance with "
            "constraint.tolerance_unit = 'absolute'"
        )
    return tolerance


def out_of_reach(signal: Signal, tolerance: float, floor: Floor) -> str:
    """Why no update can meet `tolerance`, for a signal that holds the engine constant; "" where one can.

    Such a signal pulls the learner to the engine of before, whose weights then follow: the gap of the same weights stays (signals.py).
    """
    if signal not in ("loss", "advantage") or tolerance > floor.high:
        return ""
    return (
        f"the tolerance {tolerance:.4f} is not above the floor (95 % interval {floor.low:.4f} to {floor.high:.4f}), and "
        f"constraint.signal = {signal!r} cannot bring the gap below it: lambda will rise in vain. Raise constraint.tolerance, or use "
        "constraint.signal = 'grey_box'"
    )
