"""Pairs of rewards: McNemar against the enumerated binomial, the bootstrap of the difference, and what is left without pairs."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from deploy_targets.paired import compare_pairs, mcnemar, reward_drop, unpaired_drop


@pytest.mark.parametrize(("lost", "gained"), [(a, b) for a in range(6) for b in range(6)])
def test_mcnemar_is_the_exact_binomial(lost: int, gained: int) -> None:
    """Every way that the pairs that differ could have fallen, and how many are at least as lopsided."""
    differing = lost + gained
    ways = [abs(2 * sum(way) - differing) for way in product((0, 1), repeat=differing)]
    assert mcnemar(lost, gained) == pytest.approx(np.mean([way >= abs(lost - gained) for way in ways]), rel=1e-12)


def test_mcnemar_by_the_book() -> None:
    """The textbook's 2 P(X <= 9), X ~ Binomial(34, 1/2); and counts whose binomials no float holds."""
    assert mcnemar(25, 9) == pytest.approx(2 * sum(math.comb(34, k) for k in range(10)) / 2**34)
    assert mcnemar(5000, 5000) == 1
    assert 0 < mcnemar(3000, 2600) < 1e-6


def test_pairs_are_counted_and_compared() -> None:
    expected = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.5, 1.0, 0.0])
    rewards = np.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0])
    pairs = compare_pairs(expected, rewards)
    assert (pairs.num_pairs, pairs.lost, pairs.gained) == (8, 2, 1)
    assert (pairs.p_value, pairs.accuracy_at_export) == (1, 0.5)
    assert pairs.drop.value == 1 / 8
    assert reward_drop(expected, rewards).value == pytest.approx((expected - rewards).mean())


def test_a_reward_that_is_no_number_is_unsolved_and_in_no_mean() -> None:
    expected, rewards = np.array([1.0, 1.0, 0.0]), np.array([math.nan, 1.0, 0.0])
    pairs, changed = compare_pairs(expected, rewards), reward_drop(expected, rewards)
    assert (pairs.num_pairs, pairs.lost) == (3, 1)
    assert (changed.value, changed.num_sequences) == (0, 2)


@pytest.mark.parametrize(("lost", "gained"), [(0.1, 0.0), (0.15, 0.1), (0.05, 0.02)])
def test_the_paired_interval_covers_the_truth(lost: float, gained: float) -> None:
    rng, covered = np.random.default_rng(2), 0
    for _ in range(500):
        fate = rng.random(120)
        solved = (fate < lost) | (fate > 0.5)
        drop = compare_pairs(solved.astype(float), ((solved & (fate >= lost)) | ((fate > 0.5 - gained) & (fate <= 0.5))).astype(float)).drop
        assert drop.low is not None
        assert drop.high is not None
        covered += drop.low <= lost - gained <= drop.high
    assert 0.92 <= covered / 500 <= 0.99


def test_pairs_that_all_agree_still_have_an_interval() -> None:
    """None of n differs: 95 % of the time fewer than 3 / n do (the rule of three)."""
    for count in (20, 200, 2000):
        solved = (np.arange(count) % 2).astype(float)
        drop = compare_pairs(solved, solved).drop
        assert drop.value == 0
        assert drop.low is not None
        assert drop.high is not None
        assert 2 / (count + 2) <= drop.high <= 4 / (count + 2)
        assert drop.low == pytest.approx(-drop.high, abs=1 / (count + 2))


def test_pairs_tell_what_two_averages_cannot() -> None:
    """200 problems of which eight are lost: a drop of four points that the spread of the problems hides."""
    solved = (np.arange(200) % 2).astype(float)
    here = np.where(np.arange(200) < 16, 0.0, solved)
    paired = compare_pairs(solved, here)
    apart = unpaired_drop(0.5, 200, here.mean(), 200)
    assert (paired.drop.value, apart.value) == (pytest.approx(0.04), pytest.approx(0.04))
    assert paired.drop.low is not None
    assert apart.low is not None
    assert paired.drop.low > 0 > apart.low
    assert paired.p_value == pytest.approx(2 / 2**8)


def test_the_unpaired_interval_is_newcombes() -> None:
    """His example: 56/70 against 48/80, 95 % by method 10: 0.0524 to 0.3339."""
    drop = unpaired_drop(56 / 70, 70, 48 / 80, 80)
    assert (drop.low, drop.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
    whole = unpaired_drop(1.0, 10, 1.0, 10)
    assert whole.low is not None
    assert whole.high is not None
    assert -0.3 < whole.low < 0 < whole.high < 0.3
