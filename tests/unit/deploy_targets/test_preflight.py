"""Everything that does not fit is listed, in one error, before anything is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

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


@pytest.fixture
def model(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models("qwen3"), tmp_path / "model"))


def offenders(profile: TargetProfile, model: Path) -> str:
    with pytest.raises(PreflightError) as caught:
        preflight(profile, model)
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


@no_gpu
def test_int4_experts_are_refused_on_a_cpu(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts": 8}))
    assert "mixture-of-experts" in offenders(changed("int4-vllm", hardware=HardwareSpec()), model)


def test_every_shipped_profile_can_be_checked() -> None:
    for name, profile in shipped_profiles().items():
        assert all("unknown engine" not in reason for reason in check_target(profile)), name
