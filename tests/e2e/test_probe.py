"""`probe` and `verify-deploy` on a model that was not trained here and on artifacts that others' tools made of it, by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from deploy_targets.probes import KINDS, LearnerDetails, Probe, read_probes
from deploy_targets.profile import load_profile
from hetero_rl.model import resolve_model
from tests.command_line import fails, hetero_rl, with_settings
from tests.conftest import TinyModels
from tests.foreign_artifacts import by_compressed_tensors, by_llama_cpp, by_onnx_builder, worse_copy
from tests.skips import skip_unless_it_runs_here

DEMO = resolve_model("demo")
TOLERANCE = "0.03"
"""For INT4: the gap of the demo model on these prompts is 0.012 (ONNX), 0.013 (Q4_K_M) and 0.027 (compressed-tensors)."""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Probes of the demo model, by a file of prompts: text and token ids."""
    folder = tmp_path_factory.mktemp("probes")
    prompts = [{"prompt": f"{i}+{1099 - i}="} for i in range(110, 999, 2)] + [{"prompt_tokens": [5, 6, 7, 8], "answer": "x"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    settings = with_settings("loop.max_response_tokens=8", "learner.compute_dtype=bfloat16")
    result = hetero_rl("probe", DEMO, "--out", folder, "--prompts", "prompts.jsonl", "--target", "int4-onnx", *settings, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "446 of prompts.jsonl" in result.stdout
    assert "bfloat16 arithmetic" in result.stdout
    return folder / "probes.st"


def test_probes_of_every_kind(probes: Path) -> None:
    found, spec = read_probes(probes), load_profile("int4-onnx").probes
    counts = {kind: found.num_scored(kind) for kind in KINDS}
    assert all(counts[kind] == pytest.approx(spec.num_tokens * getattr(spec, kind), rel=0.15) for kind in KINDS if kind != "certain")
    assert 0 < counts["certain"] <= 1.1 * spec.num_tokens * spec.certain
    assert max(len(p.sequence.tokens) for p in found.of_kind("long").probes) == 511
    assert {p.sequence.tokens[: p.sequence.prompt_len] for p in found.of_kind("policy").probes} >= {(5, 6, 7, 8)}
    assert (found.learner_dtype, found.source_model, found.weight_version) == ("bfloat16", DEMO.name, 0)
    policy = found.of_kind("policy").probes
    rounding = [np.abs(np.exp(p.learner_logps) - np.exp(details_of(p).logps_fp32)) for p in policy]
    assert 1e-4 < np.concatenate(rounding).mean() < 0.01
    for p in found.of_kind("greedy").probes:
        assert (p.learner_greedy == p.sequence.tokens[p.sequence.prompt_len :]).mean() > 0.7


def details_of(probe: Probe) -> LearnerDetails:
    assert probe.details is not None
    return probe.details


@pytest.mark.parametrize(
    ("target", "make"),
    [
        pytest.param("int4-onnx", by_onnx_builder, marks=pytest.mark.slow),
        ("q4_k_m-llamacpp", by_llama_cpp),
        pytest.param("int4-vllm", by_compressed_tensors, marks=pytest.mark.slow),
    ],
)
def test_an_artifact_of_another_tool(target: str, make: Callable[[Path, Path], Path], probes: Path, tmp_path: Path) -> None:
    skip_unless_it_runs_here(load_profile(target))
    artifact = make(DEMO, tmp_path / "artifact")
    result, report = verified(artifact, target, probes, tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    assert report["verdict"] == "pass", report["gates"]
    assert 0.005 < report["gap"]["mean"] < 0.03
    assert all(layer["problem"] == "" and layer["error"] < 0.2 for layer in report["layers"])
    assert bool(report["layers"]) == (make is not by_onnx_builder)
    assert set(report["other_kinds"]) == {"greedy", "long", "rare", "certain"}
    noise = {name: measured["value"] for name, measured in report["learner"]["noise"].items()}
    assert report["learner"]["dtype"] == "bfloat16"
    assert 1e-4 < noise["abs_dp"] < report["gap"]["mean"]
    assert noise["explained"] == pytest.approx(report["gap"]["mean"] - noise["gap_to_fp32"])
    assert abs(noise["explained"]) < noise["abs_dp"]
    assert "the learner's rounding explains" in result.stdout
    assert (report["hashes_checked"], report["floor"], report["tolerance"]) == (False, None, 0.03)
    assert "no hash was checked" in result.stdout
    assert "What this machine serves is the model that was probed" in result.stdout
    assert "no hash was checked" in (tmp_path / "v.html").read_text()
    assert report["artifact_sha256"] in result.stdout


@pytest.mark.parametrize("make", [pytest.param(by_onnx_builder, marks=pytest.mark.slow), by_llama_cpp])
def test_a_broken_conversion_fails(make: Callable[[Path, Path], Path], probes: Path, tmp_path: Path) -> None:
    target = "int4-onnx" if make is by_onnx_builder else "q4_k_m-llamacpp"
    artifact = make(worse_copy(DEMO, tmp_path / "worse"), tmp_path / "artifact")
    result, report = verified(artifact, target, probes, tmp_path)
    assert result.returncode == 3, result.stderr + result.stdout
    assert {gate["name"]: gate["verdict"] for gate in report["gates"]}["gap_mean"] == "fail"
    if make is by_llama_cpp:  # the builder's own files of weights are not read
        assert report["blame"]["sentence"].startswith("model.layers.0.mlp.down_proj.weight: is all zeros")
        errors = {layer["name"]: layer["error"] for layer in report["layers"]}
        assert errors.pop("model.layers.0.mlp.down_proj.weight") == pytest.approx(1, abs=0.3)
        assert len(errors) == 35
        assert max(errors.values()) < 0.2


def verified(artifact: Path, target: str, probes: Path, cwd: Path) -> tuple[Any, Any]:
    given = ("--probes", probes, "--target", target, "--tolerance", TOLERANCE, "--json", "v.json", "--html", "v.html")
    result = hetero_rl("verify-deploy", artifact, *given, cwd=cwd, timeout_s=600)
    assert (cwd / "v.json").is_file(), result.stderr
    report = json.loads((cwd / "v.json").read_text())
    schema = json.loads((resources.files("deploy_targets") / "schemas" / "verify-report-1.json").read_text("utf-8"))
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)
    return result, report


def test_a_model_in_its_own_words(tiny_models: TinyModels, tmp_path: Path) -> None:
    """No prompts: the model goes on from the token that begins a text; a task's prompts come from a config."""
    model = tiny_models("qwen3")
    alone = hetero_rl("probe", model, "--out", "a.st", "--tokens", "512", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert "none: the model's own samples after" in alone.stdout
    found = read_probes(tmp_path / "a.st")
    assert {p.sequence.prompt_len for p in found.of_kind("policy").probes} == {1}
    assert 300 < found.num_scored("policy") < 32 * 64
    again = hetero_rl("probe", model, "--out", "b.st", "--tokens", "512", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [p.sequence for p in found.probes] == [p.sequence for p in read_probes(tmp_path / "b.st").probes]
    settings = with_settings("task.digits=2", "loop.temperature=0.5")
    task = hetero_rl("probe", "demo", "--out", "c.st", "--tokens", "512", *settings, cwd=tmp_path)
    assert task.returncode == 0, task.stderr
    assert "held-out problems of the task" in task.stdout
    assert read_probes(tmp_path / "c.st").temperature == 0.5
    fails(hetero_rl("probe", "demo", "--out", "c.st", cwd=tmp_path), 2, "c.st exists already")
    # After nothing at all the demo model ends the text, always: thousands of samples, and nothing known.
    silent = hetero_rl("probe", "demo", "--out", "d.st", "--tokens", "512", cwd=tmp_path)
    fails(silent, 2, "1 different sequences over and over", "--prompts")
