"""The floor: the gap that is there before anything was learned, and the tolerance in its units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deploy_targets.errors import EngineError
from hetero_rl.algorithm.kinds import Signal


@dataclass(frozen=True, slots=True)
class Floor:
    """Mean abs(dp) of the same weights on both machines, with a 95 % interval over sequences."""

    mean: float
    low: float
    high: float
    num_tokens: int
    num_nonfinite: int = 0
    """Tokens without a finite engine log-prob; they are in neither the sum nor the count."""


def measure_floor(gaps: list[NDArray[np.float32]], *, seed: int = 0, num_resamples: int = 500) -> Floor:
    """The floor from per-token gaps of several sequences.

    Args:
        gaps: One float32 array [num_tokens_i] of abs(dp) per sequence; NaN (no engine log-prob) is left out.
        seed: Seed of the bootstrap.
        num_resamples: Bootstrap resamples. Sequences, not tokens, are drawn: tokens of one response are not independent.

    Raises:
        EngineError: no token has a finite gap.
    """
    sums = np.array([np.nansum(gap) for gap in gaps], dtype=np.float64)
    counts = np.array([np.isfinite(gap).sum() for gap in gaps], dtype=np.float64)
    if counts.sum() == 0:
        raise EngineError(
            f"the engine gave no finite log-prob for any of {sum(map(len, gaps))} sampled tokens, so there is no floor to measure. "
            "Look for overflow: `hetero-rl eval --target bf16-transformers` shows whether the model itself is sound"
        )
    draws = np.random.default_rng(seed).integers(0, len(gaps), (num_resamples, len(gaps)))
    means = sums[draws].sum(axis=1) / np.maximum(counts[draws].sum(axis=1), 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Floor(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()), sum(map(len, gaps)) - int(counts.sum()))


def tolerance_from(value: float, unit: Literal["floor", "absolute"], floor: Floor, least: float = 0.0) -> float:
    """The bound on the mean abs(dp): `value` times the floor and not below `least`, or `value` itself.

    A target of 8 or more bits has a floor that the arithmetic of another CPU exceeds; nothing is served better by holding it.
    """
    return max(value * floor.mean, least) if unit == "floor" else value


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
