"""Everything that can be wrong with a deployment is caught by `verify-deploy`, and named: faults injected on purpose (tests/faults.py).

Through the command line in this process, so that the fault of an engine can be put around the real one.
`scripts/test_faults_caught.sh` runs them on every engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy_targets import catalog
from deploy_targets.profile import TargetProfile, load_profile
from hetero_rl.cli import main
from hetero_rl.config import load_config
from hetero_rl.model import resolve_model
from hetero_rl.probe import record_model
from tests import faults
from tests.conftest import TinyModels
from tests.skips import skip_unless_it_runs_here

variant = pytest.mark.variant
DEMO_TARGETS = [
    "int4-onnx",
    *(pytest.param(name, marks=variant) for name in ("int4-vllm", "q4_0-llamacpp", "q4_k_m-llamacpp", "nf4-transformers")),
]


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
    """(target, model) -> artifact, made once: `demo`, or a tiny model with biases and tied embeddings (`qwen2`) or experts."""
    made: dict[tuple[str, str], Made] = {}
    recorded: dict[str, Any] = {}

    def get(target: str, model: str) -> Made:
        skip_unless_it_runs_here(load_profile(target))
        if (target, model) not in made:
            profile = load_profile(target).model_copy(update={"max_model_len": 64})
            model_dir = resolve_model("demo") if model == "demo" else tiny_models(model, tied=model == "qwen2")
            if model not in recorded:
                settings = ["loop.max_response_tokens=8", "learner.compute_dtype=bfloat16", "evaluation.num_final_problems=128"]
                config, _ = load_config([], settings, None)
                recorded[model], _ = record_model(str(model_dir), config, profile, None, of_task=model == "demo", num_tokens=640)
            folder = tmp_path_factory.mktemp("artifacts") / target
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
def verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Verdict]:
    """`hetero-rl verify-deploy FOLDER --json`, with `wrap` around the engine."""

    def run(folder: Path, wrap: Callable[[Any], Any] = lambda engine: engine) -> Verdict:
        real = catalog.open_engine
        for module in ("hetero_rl.delivery", "hetero_rl.commands"):
            monkeypatch.setattr(f"{module}.open_engine", lambda *arguments: wrap(real(*arguments)))
        monkeypatch.setattr("sys.argv", ["hetero-rl", "verify-deploy", str(folder), "--json", str(tmp_path / "v.json")])
        with pytest.raises(SystemExit) as exited:
            main()
        said = capfd.readouterr()
        report = json.loads((tmp_path / "v.json").read_text()) if (tmp_path / "v.json").is_file() else None
        return Verdict(int(exited.value.code or 0), said.out + said.err, report)

    return run


def named(verdict: Verdict, cause: str) -> None:
    """Not a pass, and the most likely cause, or the error, says `cause`."""
    assert verdict.exit_code in (1, 3), verdict.text
    assert cause in (verdict.text if verdict.report is None else verdict.report["blame"]["sentence"]), verdict.text
    if verdict.report is not None:
        assert verdict.exit_code == 3
        assert "most likely cause" in verdict.text


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
NOT_OF = {"swap_scales": ("q4", "nf4"), "wrong_group_size": ("q4", "nf4"), "other_eos": (), "other_rope_theta": ()}
"""Formats that keep scales and group size within the blocks of a tensor."""


@pytest.mark.parametrize(("fault", "cause"), RESEALED)
@pytest.mark.parametrize("target", DEMO_TARGETS)
def test_a_resealed_fault_is_named(
    target: str, fault: str, cause: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path
) -> None:
    if target.startswith(NOT_OF.get(fault, ())):
        return
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
    ("model", "fault", "cause"),
    [
        ("qwen2", "drop_bias", "bias: is all zeros"),
        ("qwen2", "untie", "tied embeddings"),
        ("qwen3_moe", "nan_in_expert", "experts.2.up_proj.weight: holds 1 values that are not finite"),
    ],
)
@pytest.mark.parametrize("target", ["bf16-transformers", pytest.param("bf16-vllm", marks=variant)])
def test_faults_of_other_models(
    target: str, model: str, fault: str, cause: str, make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path
) -> None:
    folder = make(target, model).copy(tmp_path / "a")
    getattr(faults, fault)(folder)
    faults.reseal(folder)
    named(verified(folder), cause)


@pytest.mark.variant
def test_a_kv_scale_of_zero_and_a_quantized_head(make: Callable[..., Made], verified: Callable[..., Verdict], tmp_path: Path) -> None:
    made = make("int4-vllm-fp8kv", "demo")
    folder = made.copy(tmp_path / "kv")
    faults.add_zero_kv_scale(folder)
    faults.reseal(folder)
    named(verified(folder), "k_scale: is in the file and was not exported")
    folder = made.copy(tmp_path / "head")
    faults.quantize_head(folder, made.profile, made.model_dir)
    faults.reseal(folder)
    named(verified(folder), "lm_head.weight: is stored as U4")
