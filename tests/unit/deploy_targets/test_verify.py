"""The whole verification on the fake engine: what is measured, how much of it, what the report says."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy_targets.artifact import MANIFEST_FILE, PROBES_FILE, TASK_SAMPLE_FILE, check_artifact
from deploy_targets.bootstrap import resample_counts
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.errors import ArtifactError, ProofError, UsageError
from deploy_targets.gap import MEASURES, Gap
from deploy_targets.gates import Report, TaskResult, judge
from deploy_targets.probes import Kind, LearnerDetails, Probe, ProbeSet, read_probes
from deploy_targets.profile import GateSpec
from deploy_targets.report import probe_sentences
from deploy_targets.verify import Reward, gap_slices, read_task_sample, verify
from deploy_targets.weights_file import sha256_of
from tests.artifacts import VERSION, make_artifact
from tests.conftest import TinyModels

KEYS = [
    "format", "target", "model", "verdict", "gap", "kl_k3", "kl_k1", "greedy_agreement", "measures", "slices", "perplexity",
    "other_kinds", "learner", "task_accuracy", "task_accuracy_at_export", "task_paired", "gates", "blame", "blame_looked_at", "layers",
    "settings", "activations", "engine_checks", "gates_changed", "measured", "artifact_sha256", "hashes_checked", "engine", "hardware",
    "floor", "tolerance", "cost", "generate_tokens_per_s", "seconds", "created",
]  # fmt: skip


def run(
    folder: Path, *, reward: Reward | None = None, progress: Any = None, version: int = VERSION, gates: GateSpec | None = None,
    full: bool = False, **options: Any,
) -> Report:  # fmt: skip
    manifest = check_artifact(folder)
    engine = FakeEngine(folder, options, version)
    try:
        probes = read_probes(folder / PROBES_FILE)
        return verify(folder, engine, manifest, probes, reward=reward, progress=progress, gates=gates, full=full)
    finally:
        engine.close()


def shift_probability(by: float) -> Any:
    return lambda logps: np.log(np.clip(np.exp(logps) + by, 1e-6, 1.0))


def test_the_engine_that_made_the_probes_passes_with_a_gap_of_zero(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a")
    report = run(tmp_path / "a")
    assert report.verdict == "pass"
    assert report.gap.measures["abs_dp_mean"].value == pytest.approx(0, abs=1e-6)
    assert report.gap.measures["greedy_agreement"].value == 1
    assert report.gap.num_sequences == 20
    assert report.cost.generate_tokens_per_s is not None
    assert report.cost.generate_tokens_per_s > 0
    learner, engine = report.gap.perplexity
    assert learner == pytest.approx(engine)


def with_kinds(artifact: Path, kinds: Sequence[Kind], shift: float = 0.0) -> ProbeSet:
    """The probes of `artifact`, of which the last of each kind's share are of other `kinds`, shifted in the learner's log-probs."""
    probes = read_probes(artifact / PROBES_FILE)
    share = len(probes.probes) // (len(kinds) + 1)
    changed = []
    for index, probe in enumerate(probes.probes):
        kind = "policy" if index < share else kinds[min(index // share - 1, len(kinds) - 1)]
        logps = probe.learner_logps if kind == "policy" else shift_probability(shift)(probe.learner_logps).astype(np.float32)
        changed.append(replace(probe, kind=kind, learner_logps=logps))
    return replace(probes, probes=tuple(changed))


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "pass"), (0.012, "warn"), (0.03, "fail")])
def test_the_worst_kind_of_probe_is_held_against_the_bounds_too(
    shift: float, verdict: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """The gap on policy samples is apart from it, and so are KL and agreement, for which the bounds are made."""
    manifest = make_artifact(tiny_models("qwen2"), tmp_path / "a", num_sequences=60)
    engine = FakeEngine(tmp_path / "a", {}, VERSION)
    report = verify(tmp_path / "a", engine, manifest, with_kinds(tmp_path / "a", ("greedy", "long"), shift))
    gates = {gate.name: gate for gate in report.gates}
    assert (gates["gap_mean"].verdict, gates["gap_kinds"].verdict, report.verdict) == ("pass", verdict, verdict)
    assert gates["gap_kinds"].value == pytest.approx(shift / 0.01, rel=0.05, abs=1e-3)
    assert report.gap.num_sequences == 20
    assert {kind: gap.num_sequences for kind, gap in report.other_kinds.items()} == {"greedy": 20, "long": 20}
    assert set(report.to_json()["other_kinds"]) == {"greedy", "long"}
    assert any("Mean gap on other probes: greedy" in sentence for sentence in probe_sentences(report))


def test_a_kind_with_too_few_tokens_decides_nothing(tiny_models: TinyModels, tmp_path: Path) -> None:
    manifest = make_artifact(tiny_models("qwen2"), tmp_path / "a", num_sequences=33)
    probes = with_kinds(tmp_path / "a", ("greedy", "long", "rare"), 0.5)
    report = verify(tmp_path / "a", FakeEngine(tmp_path / "a", {}, VERSION), manifest, replace(probes, probes=probes.probes * 3))
    assert report.gap.num_tokens >= 200
    few = replace(probes, probes=tuple(p for p in probes.probes * 3 if p.kind == "policy") + probes.of_kind("rare").probes)
    report = verify(tmp_path / "a", FakeEngine(tmp_path / "a", {}, VERSION), manifest, few)
    assert report.other_kinds["rare"].num_tokens < 200
    assert "gap_kinds" not in {gate.name for gate in report.gates}
    assert report.verdict == "pass"


def test_non_finite_log_probs_of_every_kind_count(tiny_models: TinyModels, tmp_path: Path) -> None:
    manifest = make_artifact(tiny_models("qwen2"), tmp_path / "a", num_sequences=60)
    engine = FakeEngine(tmp_path / "a", {"nan_logps": 0.3}, VERSION)
    report = verify(tmp_path / "a", engine, manifest, with_kinds(tmp_path / "a", ("greedy", "long")))
    counts = [report.gap.num_nonfinite, *(gap.num_nonfinite for gap in report.other_kinds.values())]
    assert min(counts) > 0
    gate = next(gate for gate in report.gates if gate.name == "nonfinite_share")
    assert gate.detail.startswith(f"{sum(counts)} of")
    assert gate.verdict == "fail"


def test_the_learners_own_noise_is_reported(tiny_models: TinyModels, tmp_path: Path) -> None:
    manifest = make_artifact(tiny_models("qwen2"), tmp_path / "a", num_sequences=60)
    probes = read_probes(tmp_path / "a" / PROBES_FILE)

    def noisy(probe: Probe, by: float) -> Probe:
        exact = shift_probability(by)(probe.learner_logps).astype(np.float32)
        top = np.zeros((len(exact), 1), np.float32)
        return replace(probe, details=LearnerDetails(exact, exact + 9, top.astype(np.int32), top))

    recorded = replace(probes, probes=tuple(noisy(probe, 0.004) for probe in probes.probes), learner_dtype="bfloat16")
    engine = FakeEngine(tmp_path / "a", {}, VERSION)
    report = verify(tmp_path / "a", engine, manifest, recorded)
    noise = report.gap.learner_noise
    assert noise is not None
    assert noise.abs_dp.value == pytest.approx(0.004, rel=1e-2)
    assert noise.gap_to_fp32.value == pytest.approx(0.004, rel=1e-2)  # the engine says what the learner does
    said = report.to_json()
    assert said["learner"]["dtype"] == "bfloat16"
    assert said["learner"]["noise"]["explained"]["value"] == pytest.approx(-0.004, rel=1e-2)
    assert sum(part["num_tokens"] for part in said["slices"]["entropy"]) == report.gap.num_tokens
    assert any("log-probs in bfloat16, its own arithmetic, which lie 0.004 from float32" in line for line in probe_sentences(report))
    in_float32 = verify(tmp_path / "a", engine, manifest, replace(recorded, learner_dtype="float32"))
    assert any("in float32, its own arithmetic" in line for line in probe_sentences(in_float32))
    without = verify(tmp_path / "a", engine, manifest, probes)
    assert without.to_json()["learner"] == {"dtype": None, "noise": None}
    assert not any("Gates are held" in line for line in probe_sentences(without))


def test_a_known_shift_is_measured(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a", shift=shift_probability(0.02), tolerance=0.01)
    report = run(tmp_path / "a")
    assert report.gap.measures["abs_dp_mean"].value == pytest.approx(0.02, rel=1e-3)
    assert report.gates[0].value == pytest.approx(2.0, rel=1e-3)
    assert report.verdict == "fail"


def test_nan_log_probs_leave_mask_and_denominator(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a", shift=shift_probability(0.02), num_sequences=40)
    clean, report = run(tmp_path / "a"), run(tmp_path / "a", nan_logps=0.3)
    total = clean.gap.num_tokens
    assert report.gap.num_tokens + report.gap.num_nonfinite == total
    assert 0.2 * total < report.gap.num_nonfinite < 0.4 * total
    assert report.gap.measures["abs_dp_mean"].value == pytest.approx(0.02, rel=1e-3)
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
    assert all(set(gate) == {"name", "value", "warn", "fail", "verdict", "detail", "low", "high"} for gate in report["gates"])
    assert list(report["measures"]) == list(MEASURES)
    assert all(set(measured) == {"value", "low", "high", "num_sequences"} for measured in report["measures"].values())
    assert report["gap"]["interval"] == [report["measures"]["abs_dp_mean"][end] for end in ("low", "high")]
    assert set(report["slices"]) == {"position", "learner_probability", "token_class"}
    for parts in report["slices"].values():
        assert sum(part["num_tokens"] for part in parts) == report["gap"]["num_tokens"]
    assert set(report["cost"]) == {"generate_tokens_per_s", "first_token_s", "peak_memory_bytes", "weights_bytes"}
    assert report["cost"]["weights_bytes"] == (tmp_path / "a" / "model.safetensors").stat().st_size
    assert report["cost"]["first_token_s"] > 0
    assert report["measured"] == {"probes": 20, "num_probes": 20, "problems": 0, "num_problems": 20, "stopped": ""}
    assert report["gates_changed"] == {}
    assert report["task_paired"] is None


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
    assert gate.verdict == "undecided"  # 8 of 16 against 12 of 20 may be chance
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


def test_gates_given_instead_are_in_the_report(tiny_models: TinyModels, tmp_path: Path) -> None:
    no_kl = {"kl_k3_warn": math.inf, "kl_k3_fail": math.inf}
    make_artifact(tiny_models("qwen2"), tmp_path / "a", shift=shift_probability(0.02), tolerance=0.01, gates=GateSpec(**no_kl))
    assert run(tmp_path / "a").verdict == "fail"
    report = run(tmp_path / "a", gates=GateSpec(gap_mean_warn=1.25, gap_mean_fail=math.inf, **no_kl))
    assert report.verdict == "warn"
    assert report.to_json()["gates_changed"] == {
        "gap_mean_warn": {"artifact": "1", "used": "1.25"}, "gap_mean_fail": {"artifact": "1.5", "used": "inf"},
    }  # fmt: skip


def solving(*solved: int) -> Reward:
    """A reward that finds the problems with these answers solved."""
    return lambda prompts, completions, columns: [float(answer in solved) for answer in columns["answer"]]


def test_rewards_are_paired_with_those_of_the_export(tiny_models: TinyModels, tmp_path: Path) -> None:
    expected = [None if i == 19 else float(i < 10) for i in range(20)]
    make_artifact(tiny_models("qwen2"), tmp_path / "a", accuracy=10 / 19, expected=expected)
    pairs = run(tmp_path / "a", reward=solving(*range(2, 10), 12, 19)).to_json()["task_paired"]
    assert (pairs["num_pairs"], pairs["lost"], pairs["gained"], pairs["p_value"]) == (19, 2, 1, 1.0)
    assert pairs["drop"]["value"] == pairs["reward_drop"]["value"] == pytest.approx(1 / 19)
    same = run(tmp_path / "a", reward=solving(*range(10)))
    assert same.verdict == "pass"
    assert same.to_json()["task_paired"]["lost"] == 0
    lost = run(tmp_path / "a", reward=solving(0))
    assert lost.verdict == "fail"
    assert "McNemar p = 0.00391" in {gate.name: gate.detail for gate in lost.gates}["accuracy_drop"]


def test_probes_that_fail_clearly_stop_the_measurement(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a", num_sequences=256, shift=shift_probability(0.05), tolerance=0.01)
    report = run(tmp_path / "a", reward=solving(*range(256)))
    assert report.verdict == "fail"
    assert (report.coverage.probes, report.coverage.problems) == (32, 0)
    assert report.gap.num_sequences == 32
    assert "probes fail clearly" in report.coverage.stopped
    assert report.cost.generate_tokens_per_s is None
    whole = run(tmp_path / "a", reward=solving(*range(256)), full=True)
    assert whole.verdict == "fail"
    assert (whole.coverage.probes, whole.coverage.problems, whole.coverage.stopped) == (256, 256, "")
    assert whole.task.accuracy == 1


def test_a_task_that_is_clear_stops_the_measurement_but_not_the_probes(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a", num_sequences=1000, expected=[1.0] * 1000)
    report = run(tmp_path / "a", reward=solving(*range(1000)))
    assert report.verdict == "pass"
    assert (report.coverage.probes, report.coverage.problems) == (1000, 250)
    assert report.task.num_judged == 250
    assert report.coverage.stopped == "the accuracy is clear"


def test_what_is_measured_first_does_not_depend_on_what_the_probes_hold(tiny_models: TinyModels, tmp_path: Path) -> None:
    """The same places of two artifacts of other probes are replayed at the first look."""
    folders = [tmp_path / "a", tmp_path / "b"]
    asked: list[list[int]] = []
    for folder, shift in zip(folders, (0.05, 0.07), strict=True):
        make_artifact(tiny_models("qwen2"), folder, num_sequences=256, shift=shift_probability(shift), tolerance=0.01)
        probes = read_probes(folder / PROBES_FILE)
        engine = FakeEngine(folder, {}, VERSION)
        score, seen = engine.score, list[Any]()
        engine.score = lambda sequences, temperature, score=score, seen=seen: (seen.append(sequences), score(sequences, temperature))[1]  # type: ignore[method-assign]
        verify(folder, engine, check_artifact(folder), probes)
        places = {probe.sequence: index for index, probe in enumerate(probes.probes)}
        asked.append([places[sequence] for sequence in seen[-1]])
    assert asked[0] == asked[1]
    assert len(asked[0]) == 32


def test_measuring_adds_little_to_scoring(tiny_models: TinyModels, tmp_path: Path) -> None:
    """All measures, slices and gates of 1,000 sequences x 20 tokens, with their intervals: CPU seconds, without the engine's."""
    manifest = make_artifact(tiny_models("qwen2"), tmp_path / "a", num_sequences=1000)
    probes, engine = read_probes(tmp_path / "a" / PROBES_FILE), FakeEngine(tmp_path / "a", {}, VERSION)
    scores = engine.score([probe.sequence for probe in probes.probes])
    resample_counts.cache_clear()
    started = time.process_time()
    gap = Gap.of(probes.probes, scores)
    assert len(gap.measures) + len(gap_slices(tmp_path / "a", gap)) + len(judge(manifest, gap, TaskResult())) == len(MEASURES) + 3 + 4
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "text",
    ["{", "3", '{"prompt_tokens": [], "prompt": "", "columns": {}}', '{"prompt_tokens": [1.5], "prompt": "", "columns": {}}',
     '{"prompt_tokens": [1], "prompt": 3, "columns": {}}', '{"prompt_tokens": [1], "prompt": ""}', "\n",
     '{"prompt_tokens": [1], "prompt": "", "columns": {}, "expected": "1"}',
     '{"prompt_tokens": [1], "prompt": "", "columns": {}, "more": 1}', "[" * 100_000],
)  # fmt: skip
def test_a_malformed_task_sample_is_an_artifact_error(tmp_path: Path, text: str) -> None:
    (tmp_path / TASK_SAMPLE_FILE).write_text(text + "\n")
    with pytest.raises(ArtifactError, match=TASK_SAMPLE_FILE):
        read_task_sample(tmp_path / TASK_SAMPLE_FILE)


def test_a_task_sample_may_hold_any_line_separator_inside_its_text(tmp_path: Path) -> None:
    row = {"prompt_tokens": [1], "prompt": "one\u2028two\x85three", "columns": {}}
    (tmp_path / TASK_SAMPLE_FILE).write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    assert read_task_sample(tmp_path / TASK_SAMPLE_FILE) == [row]
