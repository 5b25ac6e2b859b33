"""The measures against closed forms, the gates as plain comparisons, and the whole verification on the fake engine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy_targets.artifact import MANIFEST_FILE, PROBES_FILE, TASK_SAMPLE_FILE, Manifest, check_artifact
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.errors import ArtifactError, ProofError, UsageError
from deploy_targets.gates import Gap, Gate, Report, TaskResult, judge, worst
from deploy_targets.probes import read_probes
from deploy_targets.profile import GateSpec
from deploy_targets.verify import Reward, read_task_sample, verify
from deploy_targets.weights_file import sha256_of
from tests.artifacts import VERSION, make_artifact
from tests.conftest import TinyModels

KEYS = [
    "verdict", "gap", "kl_k3", "kl_k1", "greedy_agreement", "task_accuracy", "task_accuracy_at_export", "gates", "artifact_sha256",
    "engine", "hardware", "floor", "tolerance", "generate_tokens_per_s", "seconds", "created",
]  # fmt: skip
NOT_MEASURED = TaskResult(accuracy=None, num_judged=0, generate_tokens_per_s=1.0)


def make_gap(
    learner_p: Sequence[float] | np.ndarray, engine_p: Sequence[float] | np.ndarray, *, num_sequences: int = 10, nonfinite: int = 0,
    agrees: Sequence[bool] | np.ndarray | None = None,
) -> Gap:  # fmt: skip
    count = len(learner_p)
    per_sequence = -(-count // num_sequences)
    return Gap(
        learner_logps=np.log(np.asarray(learner_p, float)),
        engine_logps=np.log(np.asarray(engine_p, float)),
        greedy_agrees=np.ones(count, bool) if agrees is None else np.asarray(agrees, bool),
        sequence_index=np.arange(count) // per_sequence,
        position=np.arange(count) % per_sequence,
        num_nonfinite=nonfinite,
    )


def test_measures_in_closed_form() -> None:
    learner, engine = np.array([0.5, 0.2, 0.9]), np.array([0.4, 0.25, 0.9])
    gap = make_gap(learner, engine, num_sequences=3, agrees=[True, False, True])
    summary = gap.to_json()
    assert summary["mean"] == pytest.approx((0.1 + 0.05 + 0) / 3)
    assert summary["p50"] == pytest.approx(0.05)
    assert summary["max"] == pytest.approx(0.1)
    assert summary["p99"] == pytest.approx(0.05 + 0.98 * 0.05)
    assert gap.kl_k1 == pytest.approx(np.mean(np.log(engine / learner)))
    assert gap.kl_k3 == pytest.approx(np.mean(learner / engine - 1 - np.log(learner / engine)))
    assert gap.greedy_agreement == pytest.approx(2 / 3)


def test_k1_and_k3_estimate_the_kl_of_engine_from_learner() -> None:
    engine, learner = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.3, 0.2])
    tokens = np.random.default_rng(0).choice(3, size=200_000, p=engine)
    gap = make_gap(learner[tokens], engine[tokens])
    exact = float(np.sum(engine * np.log(engine / learner)))
    assert gap.kl_k1 == pytest.approx(exact, abs=0.003)
    assert gap.kl_k3 == pytest.approx(exact, abs=0.001)
    assert exact != pytest.approx(float(np.sum(learner * np.log(learner / engine))), abs=0.003)


def test_the_interval_is_over_sequences_not_tokens() -> None:
    rng = np.random.default_rng(1)
    per_sequence = np.repeat(rng.uniform(0.0, 0.1, size=40), 50)
    gap = make_gap(0.5 + per_sequence, np.full(2000, 0.5), num_sequences=40)
    assert gap.interval is not None
    assert gap.mean is not None
    low, high = gap.interval
    means = per_sequence.reshape(40, 50).mean(1)
    half_width = 1.96 * means.std(ddof=1) / math.sqrt(40)
    assert low == pytest.approx(gap.mean - half_width, rel=0.15)
    assert high == pytest.approx(gap.mean + half_width, rel=0.15)


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    covered = 0
    for seed in range(200):
        shift = np.repeat(np.random.default_rng(seed).uniform(0, 0.1, size=40), 5)
        interval = make_gap(0.5 + shift, np.full(200, 0.5), num_sequences=40).interval
        assert interval is not None
        covered += interval[0] <= 0.05 <= interval[1]
    assert 178 <= covered <= 198


@pytest.fixture(scope="module")
def manifest(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_artifact(tiny_models("qwen2"), tmp_path_factory.mktemp("gates") / "artifact", tolerance=0.1)


def verdicts(manifest: Manifest, gap: Gap, task: TaskResult = NOT_MEASURED) -> dict[str, str]:
    return {gate.name: gate.verdict for gate in judge(manifest, gap, task)}


def shifted(by: float, count: int = 400, **options: Any) -> Gap:
    return make_gap(np.full(count, 0.5 + by), np.full(count, 0.5), **options)


@pytest.mark.parametrize(("by", "verdict"), [(0.0, "pass"), (0.0999, "pass"), (0.101, "warn"), (0.149, "warn"), (0.151, "fail")])
def test_gap_gate_in_units_of_the_tolerance(manifest: Manifest, by: float, verdict: str) -> None:
    assert verdicts(manifest, shifted(by))["gap_mean"] == verdict


def test_gap_gate_fails_by_the_interval_not_by_the_point(manifest: Manifest) -> None:
    """Mean beyond fail, but one sequence carries it all: the interval's lower end is not beyond."""
    in_first = np.arange(400) < 40
    gap = make_gap(np.where(in_first, 0.99, 0.5), np.where(in_first, 1e-9, 0.38), num_sequences=10)
    gate = judge(manifest, gap, NOT_MEASURED)[0]
    assert gate.value is not None
    assert gate.value > gate.fail
    assert gate.verdict == "warn"
    assert "more probes would decide" in gate.detail


def test_a_tolerance_of_zero_is_met_by_zero_only(manifest: Manifest) -> None:
    none = manifest.model_copy(update={"tolerance": 0.0})
    assert verdicts(none, shifted(0.0))["gap_mean"] == "pass"
    assert verdicts(none, shifted(1e-6))["gap_mean"] == "fail"


@pytest.mark.parametrize(("nonfinite", "verdict"), [(0, "pass"), (1, "warn"), (4, "warn"), (5, "fail"), (400, "fail")])
def test_nonfinite_gate(manifest: Manifest, nonfinite: int, verdict: str) -> None:
    assert verdicts(manifest, shifted(0.0, nonfinite=nonfinite))["nonfinite_share"] == verdict


@pytest.mark.parametrize(("share", "verdict"), [(1.0, "pass"), (0.95, "pass"), (0.94, "warn"), (0.85, "warn"), (0.84, "fail")])
def test_greedy_gate(manifest: Manifest, share: float, verdict: str) -> None:
    agrees = np.arange(400) < share * 400
    assert verdicts(manifest, shifted(0.0, agrees=agrees))["greedy_agreement"] == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "pass"), (1.3, "pass"), (1.5, "warn"), (1.6, "warn"), (2.0, "fail")])
def test_kl_gate(manifest: Manifest, ratio: float, verdict: str) -> None:
    gap = make_gap(np.full(400, 0.25 * ratio), np.full(400, 0.25))
    assert gap.kl_k3 == pytest.approx(ratio - 1 - math.log(ratio))
    assert verdicts(manifest, gap)["kl_k3"] == verdict


def test_an_infinite_kl_fails(manifest: Manifest) -> None:
    gap = Gap(np.full(400, -1.0), np.full(400, -1e4), np.ones(400, bool), np.arange(400) // 40, np.arange(400) % 40, 0)
    gates = {gate.name: gate for gate in judge(manifest, gap, NOT_MEASURED)}
    assert gates["kl_k3"].verdict == "fail"
    assert "infinite" in gates["kl_k3"].detail


@pytest.mark.parametrize(("accuracy", "verdict"), [(1.0, "pass"), (0.98, "pass"), (0.96, "warn"), (0.9, "fail")])
def test_accuracy_gate(manifest: Manifest, accuracy: float, verdict: str) -> None:
    task = TaskResult(accuracy=accuracy, num_judged=50, generate_tokens_per_s=1.0)
    assert verdicts(manifest, shifted(0.0), task)["accuracy_drop"] == verdict


def test_too_few_tokens_decide_nothing(manifest: Manifest) -> None:
    for gap in (shifted(0.4, count=199), shifted(0.0, count=199), shifted(0.4, num_sequences=1)):
        gates = judge(manifest, gap, NOT_MEASURED)
        assert {gate.name: gate.verdict for gate in gates} == {
            "gap_mean": "undecided", "kl_k3": "undecided", "greedy_agreement": "undecided", "nonfinite_share": "pass",
        }  # fmt: skip
        assert worst(gates) == "undecided"
    assert worst(judge(manifest, shifted(0.0, count=200), NOT_MEASURED)) == "pass"


def test_no_finite_token_at_all_fails_without_a_number(manifest: Manifest) -> None:
    gap = Gap(*(np.empty(0) for _ in range(2)), *(np.empty(0, int) for _ in range(3)), num_nonfinite=500)  # type: ignore[arg-type]
    assert worst(judge(manifest, gap, NOT_MEASURED)) == "fail"
    assert gap.to_json() == {
        "mean": None,
        "p50": None,
        "p99": None,
        "max": None,
        "interval": None,
        "num_tokens": 0,
        "num_sequences": 0,
        "nonfinite": 500,
    }


def test_the_worst_gate_decides() -> None:
    def gates(*verdicts: Any) -> list[Gate]:
        return [Gate("g", 0.0, 0.0, 0.0, verdict, "") for verdict in verdicts]

    assert worst(gates("pass", "pass")) == "pass"
    assert worst(gates("pass", "warn")) == "warn"
    assert worst(gates("warn", "undecided")) == "undecided"
    assert worst(gates("undecided", "fail", "pass")) == "fail"
    assert worst([]) == "undecided"


def run(folder: Path, *, reward: Reward | None = None, progress: Any = None, version: int = VERSION, **options: Any) -> Report:
    manifest = check_artifact(folder)
    engine = FakeEngine(folder, options, version)
    try:
        return verify(folder, engine, manifest, read_probes(folder / PROBES_FILE), reward=reward, progress=progress)
    finally:
        engine.close()


def shift_probability(by: float) -> Any:
    return lambda logps: np.log(np.clip(np.exp(logps) + by, 1e-6, 1.0))


def test_the_engine_that_made_the_probes_passes_with_a_gap_of_zero(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a")
    report = run(tmp_path / "a")
    assert report.verdict == "pass"
    assert report.gap.mean == pytest.approx(0, abs=1e-6)
    assert report.gap.greedy_agreement == 1
    assert report.gap.num_sequences == 20
    assert report.task.generate_tokens_per_s > 0


def test_a_known_shift_is_measured(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a", shift=shift_probability(0.02), tolerance=0.01)
    report = run(tmp_path / "a")
    assert report.gap.mean == pytest.approx(0.02, rel=1e-3)
    assert report.gates[0].value == pytest.approx(2.0, rel=1e-3)
    assert report.verdict == "fail"


def test_nan_log_probs_leave_mask_and_denominator(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a", shift=shift_probability(0.02), num_sequences=40)
    clean, report = run(tmp_path / "a"), run(tmp_path / "a", nan_logps=0.3)
    total = clean.gap.num_tokens
    assert report.gap.num_tokens + report.gap.num_nonfinite == total
    assert 0.2 * total < report.gap.num_nonfinite < 0.4 * total
    assert report.gap.mean == pytest.approx(0.02, rel=1e-3)
    assert report.verdict == "fail"
    assert report.to_json()["gap"]["nonfinite"] == report.gap.num_nonfinite


def test_the_json_has_exactly_the_documented_keys(tiny_models: TinyModels, tmp_path: Path) -> None:
    manifest = make_artifact(tiny_models("qwen2"), tmp_path / "a")
    report = json.loads(json.dumps(run(tmp_path / "a").to_json(), allow_nan=False))
    assert list(report) == KEYS
    assert set(report["gap"]) == {"mean", "p50", "p99", "max", "interval", "num_tokens", "num_sequences", "nonfinite"}
    assert set(report["engine"]) == {"name", "versions", "options", "weight_version", "server"}
    assert (report["engine"]["name"], report["engine"]["weight_version"]) == ("fake", VERSION)
    assert report["artifact_sha256"] == sha256_of(tmp_path / "a" / MANIFEST_FILE)
    assert (report["floor"], report["tolerance"]) == (manifest.floor, manifest.tolerance)
    assert report["task_accuracy"] is None
    assert report["task_accuracy_at_export"] == 1.0
    assert all(set(gate) == {"name", "value", "warn", "fail", "verdict", "detail"} for gate in report["gates"])


def test_accuracy_is_the_share_of_full_rewards(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a", accuracy=0.6)
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [1.0 if i < 8 else 0.9 if i < 12 else math.nan if i < 16 else None for i in columns["answer"]]

    told: list[tuple[str, int, int]] = []
    report = run(tmp_path / "a", reward=reward, progress=lambda *state: told.append(state))
    assert report.task.accuracy == 8 / 16
    assert report.task.num_judged == 16
    assert seen["prompts"] == [f"p{i}" for i in range(20)]
    assert seen["columns"] == {"answer": list(range(20))}
    assert all(isinstance(text, str) and "<eos>" not in text for text in seen["completions"])
    assert any(seen["completions"])
    gate = next(gate for gate in report.gates if gate.name == "accuracy_drop")
    assert gate.value == pytest.approx(0.1)
    assert gate.verdict == "fail"
    assert ("generating", 20, 20) in told


def test_a_reward_of_the_wrong_length_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a")
    with pytest.raises(UsageError, match="gave 1 values for 20"):
        run(tmp_path / "a", reward=lambda prompts, completions, columns: [1.0])


def test_another_weight_version_is_no_measurement(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a")
    with pytest.raises(ProofError, match="'engine': 4"):
        run(tmp_path / "a", version=4)


def test_gates_are_those_of_the_artifact(tiny_models: TinyModels, tmp_path: Path) -> None:
    gates = GateSpec(gap_mean_warn=3.0, gap_mean_fail=4.0, kl_k3_warn=math.inf, kl_k3_fail=math.inf)
    make_artifact(tiny_models("qwen2"), tmp_path / "a", shift=shift_probability(0.02), tolerance=0.01, gates=gates)
    assert run(tmp_path / "a").verdict == "pass"


@pytest.mark.parametrize(
    "text",
    ["{", "3", '{"prompt_tokens": [], "prompt": "", "columns": {}}', '{"prompt_tokens": [1.5], "prompt": "", "columns": {}}',
     '{"prompt_tokens": [1], "prompt": 3, "columns": {}}', '{"prompt_tokens": [1], "prompt": ""}', "\n", "[" * 100_000],
)  # fmt: skip
def test_a_malformed_task_sample_is_an_artifact_error(tmp_path: Path, text: str) -> None:
    (tmp_path / TASK_SAMPLE_FILE).write_text(text + "\n")
    with pytest.raises(ArtifactError, match=TASK_SAMPLE_FILE):
        read_task_sample(tmp_path / TASK_SAMPLE_FILE)


def test_a_task_sample_may_hold_any_line_separator_inside_its_text(tmp_path: Path) -> None:
    row = {"prompt_tokens": [1], "prompt": "one\u2028two\x85three", "columns": {}}
    (tmp_path / TASK_SAMPLE_FILE).write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    assert read_task_sample(tmp_path / TASK_SAMPLE_FILE) == [row]
