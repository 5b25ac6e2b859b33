"""The sequential rule: its chunks, what stops it, and by simulation that it errs no more often than it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deploy_targets.artifact import Manifest
from deploy_targets.bootstrap import CONFIDENCE, measure, ratio
from deploy_targets.gates import Gate, TaskResult, judge_measure, judge_task
from deploy_targets.profile import GateSpec
from deploy_targets.sequential import (
    FALSE_FAILS,
    FALSE_STOPS,
    LOOK_CONFIDENCE,
    accuracy_is_settled,
    chunks,
    fails_clearly,
    may_fail,
)
from tests.artifacts import make_artifact
from tests.conftest import TinyModels

SPEC = GateSpec()


def test_chunks_hold_every_sequence_once() -> None:
    for count in (1, 31, 63, 64, 200, 1000):
        parts = chunks(count, full=False)
        assert sorted(index for part in parts for index in part) == list(range(count))
        assert all(part == sorted(part) for part in parts)
        assert chunks(count, full=True) == [list(range(count))]


def test_looks_come_at_an_eighth_a_quarter_and_a_half_but_not_before_32() -> None:
    assert [len(part) for part in chunks(1000, full=False)] == [125, 125, 250, 500]
    assert [len(part) for part in chunks(200, full=False)] == [50, 50, 100]
    assert [len(part) for part in chunks(64, full=False)] == [32, 32]
    assert [len(part) for part in chunks(63, full=False)] == [63]
    assert chunks(0, full=False) == []


def test_a_chunk_is_a_fair_sample_of_the_order() -> None:
    first = chunks(4000, full=False)[0]
    assert np.mean(first) == pytest.approx(1999.5, abs=4 * 4000 / np.sqrt(12 * 500))
    assert chunks(4000, full=False)[0] == first


@pytest.fixture(scope="module")
def manifest(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_artifact(tiny_models("qwen2"), tmp_path_factory.mktemp("sequential") / "artifact")


def gate(name: str, verdict: str, low: float | None, high: float | None) -> Gate:
    return Gate(name, 0.0, 1.0, 2.0, verdict, "", low, high)  # type: ignore[arg-type]


def test_what_stops() -> None:
    assert fails_clearly([gate("kl_k3", "pass", 0.1, 0.2), gate("gap_mean", "fail", 2.1, 3.0)])
    assert not fails_clearly([gate("gap_mean", "undecided", 2.1, 3.0), gate("kl_k3", "undecided", 1.9, 3.0)])
    assert not fails_clearly([gate("nonfinite_share", "fail", 0.5, 9.0)])  # by count, not yet by the interval
    assert not may_fail([gate("kl_k3", "undecided", None, None)])
    assert may_fail([replace(gate("kl_k3", "undecided", None, None), value=2.1)])
    assert accuracy_is_settled([gate("accuracy_drop", "pass", 0.1, 0.9)])
    assert accuracy_is_settled([gate("accuracy_drop", "warn", 1.1, 1.9)])
    assert accuracy_is_settled([gate("accuracy_drop", "fail", 2.1, 2.9)])
    assert not accuracy_is_settled([gate("accuracy_drop", "pass", 0.1, 1.1)])
    assert not accuracy_is_settled([gate("accuracy_drop", "undecided", 0.1, 0.9), gate("gap_mean", "pass", 0.1, 0.2)])
    assert not accuracy_is_settled([gate("accuracy_drop", "undecided", None, None)])


def replayed(rng: np.random.Generator, truth: float, count: int) -> tuple[str, int]:
    """Verdict on the gap of `count` sequences of unequal length and skewed gaps of mean `truth`, and how many were replayed."""
    lengths = rng.integers(5, 40, count)
    sums, done = np.stack([rng.gamma(2, truth / 2, count) * lengths, lengths], axis=1).astype(float), list[int]()
    for chunk in chunks(count, full=False):
        done = sorted([*done, *chunk])
        if len(done) < count and fails_clearly([judge_measure(SPEC, "gap_mean", measure(ratio, sums[done], LOOK_CONFIDENCE), "")]):
            break
    return judge_measure(SPEC, "gap_mean", measure(ratio, sums[done]), "").verdict, len(done)


def answered(manifest: Manifest, rng: np.random.Generator, lost: float, gained: float, count: int) -> tuple[str, int]:
    """Verdict on the accuracy of `count` problems of which shares are `lost` and `gained` in truth, and how many were answered."""
    fate = rng.random(count)
    expected = np.where(fate < lost, 1.0, np.where(fate < lost + gained, 0.0, np.round(fate)))
    rewards = np.where(fate < lost, 0.0, np.where(fate < lost + gained, 1.0, expected))

    def judged(done: list[int], confidence: float) -> Gate:
        (gate,) = judge_task(SPEC, manifest, TaskResult(rewards[done], expected[done]), confidence)
        return gate

    done: list[int] = []
    for chunk in chunks(count, full=False):
        done = sorted([*done, *chunk])
        if len(done) < count and accuracy_is_settled([judged(done, LOOK_CONFIDENCE)]):
            break
    return judged(done, CONFIDENCE).verdict, len(done)


@pytest.mark.parametrize("count", [64, 200])
def test_probes_on_the_fail_bound_do_not_fail_more_often_than_promised(count: int) -> None:
    """The gap lies on the bound itself; 1,000 verifications."""
    rng = np.random.default_rng(1)
    outcomes = [replayed(rng, SPEC.gap_mean_fail, count) for _ in range(1000)]
    assert 0 < sum(verdict == "fail" for verdict, _ in outcomes) <= 1000 * FALSE_FAILS
    early = [verdict for verdict, measured in outcomes if measured < count]
    assert set(early) <= {"fail"}
    assert len(early) <= 1000 * FALSE_STOPS


def test_probes_far_beyond_the_bound_stop_at_the_first_look() -> None:
    rng = np.random.default_rng(2)
    assert [replayed(rng, 4 * SPEC.gap_mean_fail, 512) for _ in range(20)] == [("fail", 64)] * 20


def test_good_probes_are_measured_to_the_end() -> None:
    rng = np.random.default_rng(3)
    assert [replayed(rng, 0.5 * SPEC.gap_mean_warn, 200) for _ in range(20)] == [("pass", 200)] * 20


@pytest.mark.parametrize(("lost", "gained"), [(SPEC.accuracy_drop_fail, 0.0), (SPEC.accuracy_drop_fail + 0.05, 0.05)])
def test_tasks_on_the_fail_bound(manifest: Manifest, lost: float, gained: float) -> None:
    """A drop on the fail bound itself: neither failed nor waved through early more often than promised; 500 verifications."""
    rng = np.random.default_rng(4)
    outcomes = [answered(manifest, rng, lost, gained, 256) for _ in range(500)]
    assert sum(verdict == "fail" for verdict, _ in outcomes) <= 500 * FALSE_FAILS
    assert sum(verdict in ("pass", "warn") and measured < 256 for verdict, measured in outcomes) <= 500 * FALSE_STOPS


@pytest.mark.parametrize(("lost", "gained"), [(SPEC.accuracy_drop_warn, 0.0), (SPEC.accuracy_drop_warn + 0.03, 0.03)])
def test_tasks_on_the_warn_bound_do_not_pass_early(manifest: Manifest, lost: float, gained: float) -> None:
    """The rare case is the hard one: with 3 % lost, the first look often sees none."""
    rng = np.random.default_rng(5)
    outcomes = [answered(manifest, rng, lost, gained, 256) for _ in range(500)]
    assert sum(verdict == "pass" and measured < 256 for verdict, measured in outcomes) <= 500 * FALSE_STOPS


def test_a_task_that_answers_as_at_export_stops_early(manifest: Manifest) -> None:
    rng = np.random.default_rng(6)
    assert answered(manifest, rng, 0.0, 0.0, 1000) == ("pass", 250)
