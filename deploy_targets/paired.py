"""Rewards on the same problems, at export and on this machine: did the task get worse?

The pairs decide, not the two averages: the noise of how hard each problem is falls out of the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from deploy_targets.bootstrap import CONFIDENCE, Floats, Measure, mean

SOLVED = 1.0 - 1e-6
"""A problem counts as solved from this reward on."""


@dataclass(frozen=True, slots=True)
class Paired:
    """The pairs: problems `lost` (solved at export, not here) and `gained`, and what follows from them.

    `accuracy_at_export`: share of these problems that were solved there. `drop`: that share minus the one here.
    `p_value`: of McNemar's exact test.
    """

    num_pairs: int
    accuracy_at_export: float
    lost: int
    gained: int
    p_value: float
    drop: Measure


def compare_pairs(expected: Floats, rewards: Floats, confidence: float = CONFIDENCE) -> Paired:
    """Hold `rewards` float64 [num_problems] against those `expected` of the same problems.

    The interval is a bootstrap over problems, with one more lost and one more gained pair in what is drawn from (Bonett and Price 2012,
    https://doi.org/10.3102/1076998611411915): pairs that all agree would otherwise have an interval without width, though the next
    hundred may not.
    """
    solved_then, solved_here = expected >= SOLVED, rewards >= SOLVED
    lost, gained = int((solved_then & ~solved_here).sum()), int((~solved_then & solved_here).sum())
    drops = np.append(solved_then.astype(float) - solved_here, [1.0, -1.0])
    widened = mean(drops, np.arange(len(drops)), len(drops), confidence)
    drop = Measure((lost - gained) / len(rewards), widened.low, widened.high, len(rewards))
    return Paired(len(rewards), float(solved_then.mean()), lost, gained, mcnemar(lost, gained), drop)


def reward_drop(expected: Floats, rewards: Floats) -> Measure:
    """Mean reward at export minus that here, over the pairs of two finite rewards; a paired bootstrap."""
    finite = np.isfinite(expected) & np.isfinite(rewards)
    changes = (expected - rewards)[finite]
    return mean(changes, np.arange(len(changes)), len(changes))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: of the pairs that differ, half are expected to be lost.

    min(1, 2 P(X <= min(lost, gained))), X ~ Binomial(lost + gained, 1/2). Source: McNemar 1947, https://doi.org/10.1007/BF02295996.
    """
    differing = lost + gained
    term = tail = 1  # binomial coefficients, as integers: they outgrow every float
    for k in range(min(lost, gained)):
        term = term * (differing - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << differing))


def unpaired_drop(then: float, num_then: int, here: float, num_here: int, confidence: float = CONFIDENCE) -> Measure:
    """Share `then` of `num_then` problems minus share `here` of `num_here`, taken for two independent samples.

    Interval: Newcombe's hybrid of two Wilson score intervals (https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8%3C873::AID-SIM779%3E3.0.CO;2-I,
    method 10).
    """
    (low_then, high_then), (low_here, high_here) = _wilson(then, num_then, confidence), _wilson(here, num_here, confidence)
    drop = then - here
    low, high = drop - math.hypot(then - low_then, high_here - here), drop + math.hypot(high_then - then, here - low_here)
    return Measure(drop, low, high, num_here)


def _wilson(share: float, count: int, confidence: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - half) / scale, (centre + half) / scale
