"""The rule of the gates as a truth table, and each gate on measurements."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deploy_targets.artifact import Manifest
from deploy_targets.bootstrap import Measure
from deploy_targets.errors import ProfileError, UnknownNameError, UsageError
from deploy_targets.gap import Gap
from deploy_targets.gates import EXIT_CODES, VERDICTS, Gate, TaskResult, judge, judge_measure, worst
from deploy_targets.profile import GateSpec, parse_bounds, with_bounds
from tests.artifacts import make_artifact
from tests.conftest import TinyModels
from tests.gaps import empty_gap, make_gap

INF, NAN = math.inf, math.nan
UPPER = GateSpec(gap_mean_warn=1.0, gap_mean_fail=2.0)
LOWER = GateSpec(greedy_agreement_warn=0.9, greedy_agreement_fail=0.8)

UPPER_TABLE: list[tuple[float | None, float | None, float | None, int, str]] = [
    (0.5, 0.4, 0.6, 100, "pass"),
    (0.5, 0.4, 1.5, 100, "pass"),
    (0.5, 0.1, 3.0, 100, "pass"),  # the point is what is believed, as long as it is good
    (1.0, 0.9, 1.1, 100, "pass"),  # on the bound is not beyond it
    (1.5, 1.2, 1.9, 100, "warn"),
    (1.5, 0.8, 1.9, 8, "warn"),
    (1.5, 0.8, 2.1, 100, "warn"),
    (1.5, 0.8, 2.1, 30, "warn"),
    (1.5, 0.8, 2.1, 29, "undecided"),  # reaches beyond fail, and rests on few
    (2.0, 1.5, 2.0, 8, "warn"),
    (2.5, 1.9, 3.0, 1000, "undecided"),  # the value is beyond fail, the interval is not
    (2.5, 2.0, 3.0, 1000, "undecided"),
    (2.5, 2.1, 3.0, 1000, "fail"),
    (2.5, 2.1, 3.0, 8, "fail"),
    (2.5, 2.1, 3.0, 7, "undecided"),  # too few for any interval
    (0.5, 0.4, 0.6, 7, "undecided"),
    (0.5, None, None, 1, "undecided"),
    (9.9, None, None, 1, "undecided"),
    (None, None, None, 0, "undecided"),
    (INF, INF, INF, 100, "fail"),
    (INF, 0.5, INF, 100, "undecided"),
    (0.5, 0.4, INF, 100, "pass"),
    (0.5, -INF, 0.6, 100, "pass"),
]


@pytest.mark.parametrize(("value", "low", "high", "count", "verdict"), UPPER_TABLE)
def test_upper_bounds(value: float | None, low: float | None, high: float | None, count: int, verdict: str) -> None:
    assert judge_measure(UPPER, "gap_mean", Measure(value, low, high, count), "").verdict == verdict


@pytest.mark.parametrize(("value", "low", "high", "count", "verdict"), UPPER_TABLE)
def test_lower_bounds_are_the_mirror_image(value: float | None, low: float | None, high: float | None, count: int, verdict: str) -> None:
    def mirrored(x: float | None) -> float | None:
        return None if x is None else 1 - 0.1 * x  # 1 -> 0.9, 2 -> 0.8

    spec = GateSpec(greedy_agreement_warn=1 - 0.1, greedy_agreement_fail=1 - 0.1 * 2.0)
    assert judge_measure(spec, "greedy_agreement", Measure(mirrored(value), mirrored(high), mirrored(low), count), "").verdict == verdict


@pytest.mark.parametrize(
    ("spec", "verdict"),
    [
        (GateSpec(gap_mean_warn=1.0, gap_mean_fail=INF), "warn"),
        (GateSpec(gap_mean_warn=INF, gap_mean_fail=INF), "pass"),
        (GateSpec(gap_mean_warn=-INF, gap_mean_fail=-INF), "fail"),
    ],
)
def test_infinite_bounds_switch_a_level_off(spec: GateSpec, verdict: str) -> None:
    for value in (50.0, INF):
        assert judge_measure(spec, "gap_mean", Measure(value, value, value, 100), "").verdict == verdict


def test_an_undecided_gate_says_what_would_decide() -> None:
    def detail(*measured: Any) -> str:
        return judge_measure(UPPER, "gap_mean", Measure(*measured), "").detail

    assert "more sequences would decide" in detail(2.5, 1.9, 3.0, 1000)
    assert "30 sequences are needed" in detail(1.5, 0.8, 2.1, 29)
    assert "8 sequences are needed" in detail(0.5, 0.4, 0.6, 7)
    assert "[1.9, 3] over 1000 sequences" in detail(2.5, 1.9, 3.0, 1000)
    assert "two sequences are needed" in detail(0.5, None, None, 1)
    assert "not measured" in detail(None, None, None, 0)
    assert "the value is infinite" in detail(INF, INF, INF, 100)


@pytest.fixture(scope="module")
def manifest(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_artifact(tiny_models("qwen2"), tmp_path_factory.mktemp("gates") / "artifact", tolerance=0.1)


def test_the_same_sequences_over_and_over_decide_nothing(manifest: Manifest) -> None:
    """However many, of however narrow an interval: a model that has one thing to say is known by one thing."""
    p = np.full(400, 0.5)
    for num_different, verdict in ((7, "undecided"), (8, "pass"), (None, "pass")):
        gates = gates_of(manifest, replace(make_gap(p, p, num_sequences=100), num_different=num_different))
        assert {gates[name].verdict for name in ("gap_mean", "kl_k3", "greedy_agreement")} == {verdict}
    assert "7 different sequences" in gates_of(manifest, replace(make_gap(p, p, num_sequences=100), num_different=7))["gap_mean"].detail


def gates_of(manifest: Manifest, gap: Gap, task: TaskResult | None = None, **options: Any) -> dict[str, Gate]:
    return {gate.name: gate for gate in judge(manifest, gap, task or TaskResult(), **options)}


def shifted(by: float, count: int = 400, **options: Any) -> Gap:
    return make_gap(np.full(count, 0.5 + by), np.full(count, 0.5), **options)


@pytest.mark.parametrize(("by", "verdict"), [(0.0, "pass"), (0.0999, "pass"), (0.101, "warn"), (0.149, "warn"), (0.151, "fail")])
def test_gap_gate_in_units_of_the_tolerance(manifest: Manifest, by: float, verdict: str) -> None:
    assert gates_of(manifest, shifted(by))["gap_mean"].verdict == verdict


def test_gap_gate_fails_by_the_interval_not_by_the_point(manifest: Manifest) -> None:
    """Mean beyond fail, but one sequence carries it all: the interval's lower end is not beyond."""
    in_first = np.arange(400) < 40
    gate = gates_of(manifest, make_gap(np.where(in_first, 0.99, 0.5), np.where(in_first, 1e-9, 0.38), num_sequences=10))["gap_mean"]
    assert gate.value is not None
    assert gate.low is not None
    assert gate.value > gate.fail > gate.low
    assert gate.verdict == "undecided"


def test_a_tolerance_of_zero_is_met_by_zero_only(manifest: Manifest) -> None:
    none = manifest.model_copy(update={"tolerance": 0.0})
    assert gates_of(none, shifted(0.0))["gap_mean"].verdict == "pass"
    assert gates_of(none, shifted(1e-6))["gap_mean"].verdict == "fail"


@pytest.mark.parametrize(("nonfinite", "verdict"), [(0, "pass"), (1, "warn"), (4, "warn"), (5, "fail"), (400, "fail")])
def test_nonfinite_log_probs_are_counted_not_estimated(manifest: Manifest, nonfinite: int, verdict: str) -> None:
    assert gates_of(manifest, shifted(0.0, nonfinite=[nonfinite]))["nonfinite_share"].verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(1.0, "pass"), (0.95, "pass"), (0.925, "warn"), (0.875, "warn"), (0.825, "fail")])
def test_greedy_gate(manifest: Manifest, share: float, verdict: str) -> None:
    """Every sequence of 40 tokens agrees at the same share of them, so that the interval has no width."""
    agrees = np.arange(400) % 40 < share * 40
    assert gates_of(manifest, shifted(0.0, agrees=agrees))["greedy_agreement"].verdict == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "pass"), (1.3, "pass"), (1.5, "warn"), (1.6, "warn"), (2.0, "fail")])
def test_kl_gate(manifest: Manifest, ratio: float, verdict: str) -> None:
    gate = gates_of(manifest, make_gap(np.full(400, 0.25 * ratio), np.full(400, 0.25)))["kl_k3"]
    assert gate.value == pytest.approx(ratio - 1 - math.log(ratio))
    assert gate.verdict == verdict


@pytest.mark.parametrize(
    ("lost", "gained", "count", "verdict"),
    [(0, 0, 400, "pass"), (20, 20, 400, "pass"), (16, 0, 400, "warn"), (30, 0, 400, "warn"), (33, 0, 400, "undecided"),
     (60, 0, 400, "fail"), (1, 0, 20, "undecided"), (0, 0, 20, "pass"), (20, 0, 20, "fail"), (0, 0, 7, "undecided")],
)  # fmt: skip
def test_accuracy_gate_of_pairs(manifest: Manifest, lost: int, gained: int, count: int, verdict: str) -> None:
    expected, rewards = np.ones(count), np.ones(count)
    rewards[:lost] = 0
    expected[lost : lost + gained] = 0
    gate = gates_of(manifest, shifted(0.0), TaskResult(rewards, expected))["accuracy_drop"]
    assert gate.value == pytest.approx((lost - gained) / count)
    assert gate.verdict == verdict
    assert "McNemar p = " in gate.detail


@pytest.mark.parametrize(("accuracy", "verdict"), [(1.0, "pass"), (0.98, "pass"), (0.96, "warn"), (0.9, "undecided"), (0.7, "fail")])
def test_accuracy_gate_without_pairs_knows_its_noise(manifest: Manifest, accuracy: float, verdict: str) -> None:
    """An export that did not record single rewards got 1.0 on 400 problems; here there are 50."""
    many = manifest.model_copy(update={"task": manifest.task.model_copy(update={"num_problems": 400})})  # type: ignore[union-attr]
    gate = gates_of(many, shifted(0.0), TaskResult((np.arange(50) < accuracy * 50).astype(float)))["accuracy_drop"]
    assert gate.verdict == verdict
    assert "not paired" in gate.detail


def test_rewards_that_the_export_lacks_leave_the_pairs(manifest: Manifest) -> None:
    expected = np.where(np.arange(60) < 20, np.nan, 1.0)
    task = TaskResult(np.where(np.arange(60) < 20, 0.0, 1.0), expected)
    assert task.accuracy == 40 / 60
    pairs = task.paired()
    assert pairs is not None
    assert (pairs.num_pairs, pairs.lost) == (40, 0)
    assert "not paired" in gates_of(manifest, shifted(0.0), TaskResult(np.ones(60), np.full(60, np.nan)))["accuracy_drop"].detail


def test_too_few_tokens_decide_nothing(manifest: Manifest) -> None:
    for gap in (shifted(0.4, count=199), shifted(0.0, count=199), shifted(0.4, num_sequences=1), shifted(0.4, num_sequences=7)):
        gates = judge(manifest, gap, TaskResult())
        assert {gate.name: gate.verdict for gate in gates} == {
            "gap_mean": "undecided", "kl_k3": "undecided", "greedy_agreement": "undecided", "nonfinite_share": "pass",
        }  # fmt: skip
        assert worst(gates) == "undecided"
    assert worst(judge(manifest, shifted(0.0, count=200), TaskResult())) == "pass"


def test_no_finite_token_at_all_fails(manifest: Manifest) -> None:
    assert worst(judge(manifest, empty_gap(500), TaskResult())) == "fail"


def test_the_worst_gate_decides_and_has_an_exit_code() -> None:
    def gates(*verdicts: Any) -> list[Gate]:
        return [Gate("g", 0.0, 0.0, 0.0, verdict, "") for verdict in verdicts]

    assert worst(gates("pass", "pass")) == "pass"
    assert worst(gates("pass", "warn")) == "warn"
    assert worst(gates("warn", "undecided")) == "undecided"
    assert worst(gates("undecided", "fail", "pass")) == "fail"
    assert worst([]) == "undecided"
    assert [EXIT_CODES[verdict] for verdict in VERDICTS] == [0, 0, 4, 3]


def test_other_gates_than_the_artifacts(manifest: Manifest) -> None:
    gap = shifted(0.151)
    assert gates_of(manifest, gap, gates=GateSpec(gap_mean_fail=2.0))["gap_mean"].verdict == "warn"
    assert gates_of(manifest, gap, gates=GateSpec(gap_mean_warn=2.0, gap_mean_fail=2.0))["gap_mean"].verdict == "pass"


def test_bounds_from_the_command_line() -> None:
    assert parse_bounds(["gap_mean_fail=2.0", "kl_k3_fail = inf", "gap_mean_fail=3"]) == {"gap_mean_fail": 3.0, "kl_k3_fail": INF}
    changed = with_bounds(GateSpec(gap_mean_warn=0.7), {"gap_mean_fail": 3.0})
    assert (changed.gap_mean_warn, changed.gap_mean_fail) == (0.7, 3.0)
    with pytest.raises(UnknownNameError, match=r"unknown gate 'gap_fail'.*gap_mean_fail.*Known: .*accuracy_drop_warn"):
        parse_bounds(["gap_fail=2"])
    for wrong in ("gap_mean_fail", "gap_mean_fail=", "gap_mean_fail=many"):
        with pytest.raises(UsageError, match="must be name=number"):
            parse_bounds([wrong])
    with pytest.raises(ProfileError, match="nan is no bound"):
        with_bounds(GateSpec(), {"gap_mean_fail": NAN})
    with pytest.raises(ProfileError, match=r"gap_mean_fail = 0\.5 must be at least gap_mean_warn"):
        with_bounds(GateSpec(), {"gap_mean_fail": 0.5})
