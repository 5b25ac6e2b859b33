"""The measures of the gap in closed form, against those of a run, and where the gap lies."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deploy_targets.gap import MEASURES, Gap
from deploy_targets.probes import LearnerDetails, Probe
from deploy_targets.types import TokenScores, TokenSequence
from hetero_rl.algorithm import discrepancy
from hetero_rl.algorithm.corrections import effective_share
from tests.gaps import empty_gap, make_gap

RNG = np.random.default_rng(0)
LEARNER, ENGINE = RNG.uniform(0.05, 1.0, size=(2, 300))


def value(gap: Gap, name: str) -> float:
    found = gap.measures[name].value
    assert found is not None
    return found


def test_measures_in_closed_form() -> None:
    learner, engine = np.array([0.5, 0.2, 0.9, 0.3]), np.array([0.4, 0.25, 0.9, 0.6])
    gap = make_gap(learner, engine, num_sequences=2, agrees=[True, False, True, True], nonfinite=[0, 1])
    assert value(gap, "abs_dp_mean") == pytest.approx((0.1 + 0.05 + 0 + 0.3) / 4)
    assert value(gap, "abs_dp_p50") == pytest.approx(0.05)
    assert value(gap, "abs_dp_p99") == pytest.approx(0.3)
    assert value(gap, "abs_dp_max") == pytest.approx(0.3)
    ratios = np.array([1.25, 0.8, 1.0, 0.5])
    assert value(gap, "kl_k1") == pytest.approx(np.mean(-np.log(ratios)))
    assert value(gap, "kl_k3") == pytest.approx(np.mean(ratios - 1 - np.log(ratios)))
    assert value(gap, "chi2") == pytest.approx((0.0625 + 0.04 + 0 + 0.25) / 4)
    assert value(gap, "effective_share") == pytest.approx(3.55**2 / (4 * (1.5625 + 0.64 + 1 + 0.25)))
    assert value(gap, "greedy_agreement") == 0.75
    assert value(gap, "no_divergence_share") == 0.5
    assert value(gap, "first_divergence_p50") == 1
    assert value(gap, "nonfinite_share") == pytest.approx(1 / 5)
    assert gap.perplexity == (pytest.approx(math.prod(learner) ** -0.25), pytest.approx(math.prod(engine) ** -0.25))


@pytest.mark.parametrize(("name", "theirs"), [("abs_dp_mean", "abs_dp"), ("kl_k1", "k1"), ("kl_k3", "k3"), ("chi2", "chi2")])
def test_measures_are_those_of_a_run(name: str, theirs: str) -> None:
    function = getattr(discrepancy, theirs)
    expected = function(torch.from_numpy(np.log(LEARNER)), torch.from_numpy(np.log(ENGINE))).mean()
    assert value(make_gap(LEARNER, ENGINE), name) == pytest.approx(float(expected), rel=1e-12)


def test_the_effective_share_is_that_of_a_run() -> None:
    weights = LEARNER / ENGINE
    expected = effective_share(weights.sum(), (weights**2).sum(), len(weights))
    assert value(make_gap(LEARNER, ENGINE), "effective_share") == pytest.approx(expected, rel=1e-12)


def test_k1_k3_and_chi2_estimate_what_they_say() -> None:
    engine, learner = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.3, 0.2])
    tokens = np.random.default_rng(0).choice(3, size=200_000, p=engine)
    gap = make_gap(learner[tokens], engine[tokens])
    exact = float(np.sum(engine * np.log(engine / learner)))
    assert value(gap, "kl_k1") == pytest.approx(exact, abs=0.003)
    assert value(gap, "kl_k3") == pytest.approx(exact, abs=0.001)
    assert exact != pytest.approx(float(np.sum(learner * np.log(learner / engine))), abs=0.003)
    chi2 = float(np.sum((learner - engine) ** 2 / engine))
    assert value(gap, "chi2") == pytest.approx(chi2, abs=0.002)
    assert value(gap, "effective_share") == pytest.approx(1 / (1 + chi2), abs=0.002)


def test_every_interval_holds_its_value() -> None:
    agrees = RNG.random(300) < 0.9
    for name, measured in make_gap(LEARNER, ENGINE, num_sequences=30, agrees=agrees, nonfinite=[1, 2, 0, 1]).measures.items():
        assert None not in (measured.low, measured.value, measured.high), name
        assert measured.low < measured.high or name == "abs_dp_max"  # type: ignore[operator]
        assert measured.low <= measured.value <= measured.high, name  # type: ignore[operator]
        assert measured.num_sequences == (30 if name != "first_divergence_p50" else measured.num_sequences)


def test_the_interval_is_over_sequences_not_tokens() -> None:
    shift = np.repeat(np.random.default_rng(1).uniform(0.0, 0.1, size=40), 50)
    measured = make_gap(0.5 + shift, np.full(2000, 0.5), num_sequences=40).measures["abs_dp_mean"]
    assert measured.value is not None
    assert measured.low is not None
    assert measured.high is not None
    half_width = 2.02 * shift.reshape(40, 50).mean(1).std(ddof=1) / math.sqrt(40)
    assert measured.low == pytest.approx(measured.value - half_width, rel=0.15)
    assert measured.high == pytest.approx(measured.value + half_width, rel=0.15)


def probe(logps: list[float], engine_logps: list[float], greedy: list[int], engine_greedy: list[int]) -> tuple[Probe, TokenScores]:
    tokens = (7, *range(10, 10 + len(logps)))
    learner = Probe(TokenSequence(tokens, 1), np.array(logps, np.float32), np.array(greedy, np.int32))
    return learner, TokenScores(np.array(engine_logps, np.float32), np.array(engine_greedy, np.int32), 0, 1.0)


def test_nonfinite_tokens_leave_every_array_and_are_counted_by_sequence() -> None:
    nan, inf = math.nan, math.inf
    pairs = [
        probe([-1.0, -2.0, -3.0], [-1.0, nan, -3.5], [1, 2, 3], [1, 9, 9]),
        probe([-1.0], [-inf], [1], [1]),
        probe([-1.0, -1.5], [-1.25, -1.5], [5, 6], [5, 6]),
    ]
    gap = Gap.of(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
    np.testing.assert_allclose(gap.learner_logps, [-1.0, -3.0, -1.0, -1.5])
    np.testing.assert_allclose(gap.engine_logps, [-1.0, -3.5, -1.25, -1.5])
    np.testing.assert_array_equal(gap.greedy_agrees, [True, False, True, True])
    np.testing.assert_array_equal(gap.token_ids, [10, 12, 10, 11])
    np.testing.assert_array_equal(gap.sequence, [0, 0, 1, 1])
    np.testing.assert_array_equal(gap.position, [0, 2, 0, 1])
    np.testing.assert_array_equal(gap.nonfinite, [1, 1, 0])
    np.testing.assert_array_equal(gap.scored, [3, 1, 2])
    assert (gap.num_tokens, gap.num_sequences, gap.num_nonfinite) == (4, 2, 2)
    assert value(gap, "first_divergence_p50") == 2
    assert value(gap, "nonfinite_share") == pytest.approx(2 / 6)


def test_no_finite_token_has_no_measure_but_the_share() -> None:
    gap = empty_gap(500)
    assert value(gap, "nonfinite_share") == 1
    assert all(gap.measures[name].value is None for name in MEASURES if name != "nonfinite_share")
    assert gap.perplexity == (None, None)
    assert gap.by_position() == gap.by_learner_probability() == ()


def test_an_overflowing_k3_is_infinite_and_the_others_are_not() -> None:
    engine_logps = np.full(300, -1.0)
    engine_logps[17] = -1e4
    whole = make_gap(np.full(300, math.exp(-1)), np.full(300, math.exp(-1)))
    gap = Gap(**{**{name: getattr(whole, name) for name in Gap.__dataclass_fields__}, "engine_logps": engine_logps})
    assert value(gap, "kl_k3") == value(gap, "chi2") == math.inf
    assert value(gap, "kl_k1") == pytest.approx(-9999 / 300)
    assert value(gap, "effective_share") == pytest.approx(1 / 300)


def test_slices_by_position() -> None:
    """Ten sequences of 40: the gap is twice as large from position 8 on."""
    position = np.arange(400) % 40
    gap = make_gap(np.where(position < 8, 0.6, 0.7), np.full(400, 0.5), num_sequences=10)
    slices = {part.label: part for part in gap.by_position()}
    assert {label: part.num_tokens for label, part in slices.items()} == {"0": 10, "1 to 7": 70, "8 to 31": 240, "32 to 127": 80}
    assert slices["1 to 7"].abs_dp.value == pytest.approx(0.1)
    assert slices["8 to 31"].abs_dp.value == pytest.approx(0.2)
    assert slices["8 to 31"].abs_log_ratio.value == pytest.approx(math.log(1.4))
    assert all(part.abs_dp.num_sequences == 10 for part in slices.values())


def test_slices_by_learner_probability() -> None:
    learner = np.tile([0.05, 0.1, 0.3, 0.5, 0.95, 0.995, 1.0, 0.6], 20)
    slices = make_gap(learner, learner / 2, num_sequences=20).by_learner_probability()
    assert [(part.label, part.num_tokens) for part in slices] == [
        ("0 to 0.1", 20), ("0.1 to 0.5", 40), ("0.5 to 0.9", 40), ("0.9 to 0.99", 20), ("0.99 to 1", 40),
    ]  # fmt: skip
    assert all(part.abs_log_ratio.value == pytest.approx(math.log(2)) for part in slices)
    assert slices[0].abs_dp.value == pytest.approx(0.025)


def test_slices_by_entropy() -> None:
    entropy = np.tile([0.0, 0.005, 0.01, 0.7, 2.0, 9.0], 20)
    slices = make_gap(np.full(120, 0.6), np.full(120, 0.5), num_sequences=20, entropy=entropy).by_entropy()
    assert {part.label: part.num_tokens for part in slices} == {"0 to 0.01": 40, "0.01 to 0.1": 20, "0.5 to 1": 20, "2 and more": 40}
    assert make_gap([0.5], [0.5]).by_entropy() == ()


def test_what_the_learners_rounding_explains() -> None:
    """Of |0.5 - 0.4| it explains 0.03; where the engine rounds as the learner does, less than nothing."""
    p, exact, engine = np.tile([0.5, 0.3], 20), np.tile([0.47, 0.32], 20), np.tile([0.4, 0.3], 20)
    gap = make_gap(p, engine, fp32_p=exact)
    noise = gap.learner_noise
    assert noise is not None
    assert noise.abs_dp.value == pytest.approx(0.025)
    assert noise.gap_to_fp32.value == pytest.approx((0.07 + 0.02) / 2)
    assert noise.explained.value == pytest.approx(value(gap, "abs_dp_mean") - (0.07 + 0.02) / 2)
    assert noise.explained.num_sequences == 10
    assert make_gap(p, engine).learner_noise is None


def test_rounding_of_one_side_alone_explains_part_of_the_gap() -> None:
    learner = np.clip(LEARNER + RNG.normal(0, 0.01, 300), 1e-3, 1)
    noise = make_gap(learner, np.clip(LEARNER + RNG.normal(0, 0.01, 300), 1e-3, 1), fp32_p=LEARNER).learner_noise
    assert noise is not None
    assert noise.explained.low is not None
    assert noise.abs_dp.value is not None
    assert 0 < noise.explained.low < 0.01 * math.sqrt(2 / math.pi) * (math.sqrt(2) - 1) * 2 < noise.abs_dp.value


def test_fp32_log_probs_and_entropy_of_tokens_that_are_not_finite_are_left_out() -> None:
    probes, scores = [], []
    for tokens, engine in (((1, 2, 3), (-1.0, np.nan)), ((1, 4), (-2.0,))):
        count = len(tokens) - 1
        own = np.arange(1, count + 1, dtype=np.float32)
        details = LearnerDetails(-own, own + 10, np.zeros((count, 1), np.int32), np.zeros((count, 1), np.float32))
        probes.append(Probe(TokenSequence(tokens, 1), -own, np.zeros(count, np.int32), details=details))
        scores.append(TokenScores(np.array(engine), np.zeros(count, np.int64), 1.0, 0))
    gap, partly = Gap.of(probes, scores), Gap.of([probes[0], replace(probes[1], details=None)], scores)
    assert gap.fp32_logps is not None
    assert gap.entropy is not None
    assert (gap.fp32_logps.tolist(), gap.entropy.tolist()) == ([-1, -1], [11, 11])
    assert partly.fp32_logps is partly.entropy is partly.learner_noise is None


def test_a_slice_counts_the_sequences_that_have_one_of_its_tokens() -> None:
    bins = np.zeros(400, int)
    bins[:40], bins[40:45] = 1, 2
    parts = make_gap(np.full(400, 0.6), np.full(400, 0.5)).sliced(("a", "b", "c", "d"), bins)
    assert [(part.label, part.num_tokens, part.abs_dp.num_sequences) for part in parts] == [("a", 355, 9), ("b", 40, 1), ("c", 5, 1)]
    assert parts[1].abs_dp.low is None
