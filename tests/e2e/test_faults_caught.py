"""What can be wrong with a deployment is caught by `verify-deploy`, and named: faults injected on purpose (tests/deploy_faults.py).

Through the command line in this process, so that the fault of an engine can be put around the real one.
`scripts/test_faults_caught.sh` runs them on every engine. With HETERO_RL_FAULTS_OUT each verdict is appended to that file as a line of
JSON, from which `scripts/make_docs.py` makes the table in docs/blame.md.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deploy_targets import catalog
from deploy_targets.artifact import read_manifest
from deploy_targets.profile import TargetProfile, load_profile
from hetero_rl.cli import main
from hetero_rl.config import load_config
from hetero_rl.model import resolve_model
from hetero_rl.probe import record_model
from tests import deploy_faults as faults
from tests.conftest import TinyModels
from tests.skips import skip_unless_it_runs_here

variant = pytest.mark.variant
TARGETS = ("int4-onnx", "int4-vllm", "q4_0-llamacpp", "q4_k_m-llamacpp", "nf4-transformers")
"""The first in every test run, the others as variants."""
DEMO_TARGETS = [pytest.param(name, marks=() if name == TARGETS[0] else variant) for name in TARGETS]


@dataclass(frozen=True)
class Made:
    """An artifact without a fault."""

    profile: TargetProfile
    model_dir: Path
    folder: Path

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.folder, folder)
        return folder


@pytest.fixture(scope="module")
def make(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """(target, model) -> artifact, made once: `demo`, or a tiny model with biases and tied embeddings (`qwen2`) or experts.

    `qwen2:float32`: probes of the model in float32 arithmetic.
    """
    made: dict[tuple[str, str], Made] = {}
    recorded: dict[str, Any] = {}

    def get(target: str, model: str) -> Made:
        skip_unless_it_runs_here(load_profile(target))
        if (target, model) not in made:
            profile = load_profile(target).model_copy(update={"max_model_len": 64})
            family, _, dtype = model.partition(":")
            model_dir = resolve_model("demo") if family == "demo" else tiny_models(family, tied=family == "qwen2")
            if model not in recorded:
                settings = [
                    "loop.max_response_tokens=8",
                    f"learner.compute_dtype={dtype or 'bfloat16'}",
                    "evaluation.num_final_problems=128",
                ]
                config, _ = load_config([], settings, None)
                recorded[model], _ = record_model(str(model_dir), config, profile, None, of_task=family == "demo", num_tokens=640)
            folder = tmp_path_factory.mktemp("artifacts") / profile.name
            faults.make_artifact(profile, model_dir, recorded[model], folder)
            made[target, model] = Made(profile, model_dir, folder)
        return made[target, model]

    return get


@dataclass(frozen=True)
class Verdict:
    exit_code: int
    text: str
    report: dict[str, Any] | None


@pytest.fixture
def verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[..., Verdict]:
    """`hetero-rl verify-deploy FOLDER --json`, with `wrap` around the engine."""

    def run(folder: Path, wrap: Callable[[Any], Any] = lambda engine: engine, options: tuple[str, ...] = ()) -> Verdict:
        real = catalog.open_engine
        for module in ("hetero_rl.delivery", "hetero_rl.commands"):
            monkeypatch.setattr(f"{module}.open_engine", lambda *arguments: wrap(real(*arguments)))
        monkeypatch.setattr("sys.argv", ["hetero-rl", "verify-deploy", str(folder), "--json", str(tmp_path / "v.json"), *options])
        with pytest.raises(SystemExit) as exited:
            main()
        said = capfd.readouterr()
        report = json.loads((tmp_path / "v.json").read_text()) if (tmp_path / "v.json").is_file() else None
        (tmp_path / "v.json").unlink(missing_ok=True)
        verdict = Verdict(int(exited.value.code or 0), said.out + said.err, report)
        if out := os.environ.get("HETERO_RL_FAULTS_OUT"):
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(recorded(request, read_manifest(folder).profile.name, verdict)) + "\n")
        return verdict

    return run


def recorded(request: pytest.FixtureRequest, target: str, verdict: Verdict) -> dict[str, Any]:
    """One line of HETERO_RL_FAULTS_OUT."""
    parameters = getattr(request.node, "callspec", None)
    given = {} if parameters is None else {name: getattr(value, "__name__", value) for name, value in parameters.params.items()}
    refusal = verdict.text.rpartition("The artifact is not what was exported")[2]
    found = [line.strip(" -") for line in refusal.splitlines() if line.startswith("  - ")]
    report = verdict.report or {"verdict": "error", "gates": [], "blame": {"sentence": "; ".join(found)}}
    failed = [gate["name"] for gate in report["gates"] if gate["verdict"] == "fail"]
    cause = None if report["blame"] is None else report["blame"]["sentence"]
    return {
        "test": request.node.originalname, "given": {name: str(value) for name, value in given.items()}, "target": target,
        "exit_code": verdict.exit_code, "verdict": report["verdict"], "failed": failed, "cause": cause,
    }  # fmt: skip


def named(verdict: Verdict, cause: str) -> None:
    """Not a pass, and the most likely cause, or the error, says `cause`."""
    assert verdict.exit_code in (1, 3), verdict.text
    assert cause in (verdict.text if verdict.report is None else verdict.report["blame"]["sentence"]), verdict.text
    if verdict.report is not None:
        assert verdict.exit_code == 3
        assert "most likely cause" in verdict.text
        schema = json.loads((resources.files("deploy_targets") / "schemas" / "verify-report-1.json").read_text("utf-8"))
        jsonschema.validate(verdict.report, schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("target", DEMO_TARGETS)
def test_without_a_fault_it_passes(target: str, make: Callable[..., Made], verified: Callable[..., Verdict]) -> None:
    verdict = verified(make(target, "demo").folder)
    assert verdict.exit_code == 0, verdict.text
    assert verdict.report is not None
    assert verdict.report["blame"] is None
    assert verdict.report["settings"]["num_compared"] > 40
    assert all(layer["problem"] == "" and layer["error"] < 0.2 for layer in verdict.report["layers"])
    assert {check["name"]: check["passed"] for check in verdict.report["engine_checks"]} == dict.fromkeys(
        ("right_token", "temperature", "normalised", "sampled", "repeatable"), True
    )


@pytest.mark.parametrize("target", DEMO_TARGETS)
def test_a_flipped_byte_is_no_longer_what_was_exported(
    target: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path
) -> None:
    folder = make(target, "demo").copy(tmp_path / "a")
    faults.flip_byte(folder)
    verdict = verified(folder)
    named(verdict, "was changed")
    assert ".1." in verdict.text


RESEALED = [
    ("flip_byte", "1."),
    ("swap_scales", "mlp.down_proj.weight"),
    ("wrong_group_size", "group size"),
    ("other_rope_theta", "rope theta"),
    ("other_eos", "EOS id"),
    ("other_chat_template", "chat template"),
    ("swap_token_ids", "tokenizer vocabulary"),
]
OTHERS = {
    "bf16-transformers": (),
    "bf16-vllm": (),
    "int4-onnx": ("untie", "nan_in_expert"),
    "q4_0-llamacpp": ("remove_bias", "nan_in_expert"),
}
"""Target -> faults that cannot exist: its graph holds tied embeddings once, its files no experts; `remove_bias` edits safetensors."""
WITH_SCALES = ("int4-onnx", "int4-vllm")
"""Formats that keep scales and the size of groups apart from the blocks of a tensor."""


@pytest.mark.parametrize(
    ("target", "fault", "cause"),
    [
        pytest.param(target, fault, cause, marks=() if target == TARGETS[0] else variant)
        for target in TARGETS
        for fault, cause in RESEALED
        if target in WITH_SCALES or fault not in ("swap_scales", "wrong_group_size")
    ],
)
def test_a_resealed_fault_is_named(
    target: str, fault: str, cause: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path
) -> None:
    folder = make(target, "demo").copy(tmp_path / "a")
    getattr(faults, fault)(folder)
    faults.reseal(folder)
    verdict = verified(folder)
    named(verdict, cause)


@pytest.mark.parametrize("target", DEMO_TARGETS)
def test_older_weights_are_named(target: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path) -> None:
    made = make(target, "demo")
    folder = made.copy(tmp_path / "a")
    faults.older_weights(folder, made.profile, made.model_dir)
    faults.reseal(folder)
    named(verified(folder), "weights of another version")


@pytest.mark.parametrize("target", DEMO_TARGETS)
def test_a_length_limit_below_the_probes_is_named(
    target: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path
) -> None:
    made = make(target, "demo")
    folder = made.copy(tmp_path / "a")
    faults.reseal(folder, profile=faults.shorter(made.profile))
    named(verified(folder), "length limit")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (faults.IgnoresTemperature, "ignores the temperature"),
        (faults.TopP, "renormalised over a part of the vocabulary"),
        (faults.TopPEverywhere, "renormalised over a part of the vocabulary"),
        (faults.OtherToken, "log-probs of other tokens"),
        (faults.StalePrefix, "prefix cache"),
    ],
)
@pytest.mark.parametrize("target", DEMO_TARGETS)
def test_a_fault_of_the_engine_is_named(
    target: str, fault: Callable[[Any], Any], cause: str, make: Callable[..., Made], verified: Callable[..., Verdict]
) -> None:
    named(verified(make(target, "demo").folder, fault), cause)


@pytest.mark.parametrize(
    ("target", "model", "tolerance", "cause"),
    [
        ("bf16-transformers", "qwen2:float32", 1e-5, "engine.options.dtype (here 'bfloat16', tried 'float32')"),
        ("int4-onnx", "demo", 1e-3, "the scheme W4A16 itself"),
        pytest.param("int4-vllm-fp8kv", "demo", 5e-3, "engine.options.kv_cache_dtype", marks=variant),
    ],
)
def test_a_gap_is_explained_by_an_option_or_the_scheme(
    target: str, model: str, tolerance: float, cause: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path
) -> None:
    """The same bytes under a tolerance that what they cost does not meet."""
    folder = make(target, model).copy(tmp_path / "a")
    faults.reseal(folder, tolerance=tolerance)
    verdict = verified(folder)
    named(verdict, cause)
    assert verdict.report is not None
    looked_at = {suspect["name"]: suspect for suspect in verdict.report["blame_looked_at"]}
    assert looked_at["batches: one sequence at a time"]["explains"] < 0.5
    if verdict.report["blame"]["kind"] == "option":
        assert 0.5 < verdict.report["blame"]["explains"] <= 1


@pytest.mark.parametrize(
    ("fault", "first"),
    [(None, None), ("swap_scales", "model.layers.0.mlp.down_proj"), ("other_rope_theta", "model.rotary_emb")],
)
def test_bisect_names_the_first_module_that_departs(
    fault: str | None, first: str | None, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path
) -> None:
    made = make("int4-onnx", "demo")
    folder = made.copy(tmp_path / "a")
    if fault is not None:
        getattr(faults, fault)(folder)
        faults.reseal(folder)
    report = verified(folder, options=("--bisect", "--learner", str(made.model_dir))).report
    assert report is not None
    assert report["activations"]["first"] == first
    linear = [module for module in report["activations"]["modules"] if module["name"].endswith("gate_proj")]
    assert all(0.01 < module["local_error"] < 0.2 for module in linear)
    assert any(suspect["kind"] == "activation" for suspect in report["blame_looked_at"]) == (fault is not None)


@pytest.mark.parametrize(
    ("target", "model", "fault", "cause"),
    [
        pytest.param(target, model, fault, cause, marks=() if target == "bf16-transformers" else variant)
        for target, unlike in OTHERS.items()
        for model, fault, cause in (
            ("qwen2", "drop_bias", "bias: is all zeros"),
            ("qwen2", "remove_bias", "bias: is missing"),
            ("qwen2", "untie", "embeddings"),
            ("qwen3_moe", "nan_in_expert", "experts.2.up_proj.weight: holds 1 values that are not finite"),
        )
        if fault not in unlike
    ],
)
def test_faults_of_other_models(
    target: str, model: str, fault: str, cause: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path
) -> None:
    folder = make(target, model).copy(tmp_path / "a")
    getattr(faults, fault)(folder)
    faults.reseal(folder)
    named(verified(folder), cause)


@pytest.mark.variant
def test_a_kv_scale_of_zero(make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path) -> None:
    folder = make("int4-vllm-fp8kv", "demo").copy(tmp_path / "kv")
    faults.add_zero_kv_scale(folder)
    faults.reseal(folder)
    named(verified(folder), "k_scale: is in the file and was not exported")


@pytest.mark.parametrize(
    ("target", "stored"),
    [
        ("int4-onnx", "U4"),
        pytest.param("int4-vllm", "U4", marks=variant),
        pytest.param("q4_0-llamacpp", "Q4_0", marks=variant),
        pytest.param("q4_k_m-llamacpp", "Q4_0", marks=variant),
    ],
)
def test_a_quantized_head(target: str, stored: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path) -> None:
    """Of a target that leaves it in higher precision: for ONNX one of our own."""
    if target == "int4-onnx":
        (tmp_path / "mine.toml").write_text(
            'name = "int4-onnx-head"\ndescription = "a plain head"\nextends = "int4-onnx"\nscheme.ignore = ["lm_head"]\n'
        )
        target = str(tmp_path / "mine.toml")
    made = make(target, "demo")
    folder = made.copy(tmp_path / "head")
    faults.quantize_head(folder, made.profile, made.model_dir)
    faults.reseal(folder)
    named(verified(folder), f"lm_head.weight: is stored as {stored}")
