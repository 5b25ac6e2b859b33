"""Families of models: what checkpoints hold of fused experts, routers that stay whole, and one clear refusal for everything unknown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from deploy_targets.catalog import is_rebuilt, make_quantizer
from deploy_targets.engines.transformers import TransformersEngine
from deploy_targets.errors import EngineError, PreflightError
from deploy_targets.hardware import find_gpus
from deploy_targets.preflight import preflight
from deploy_targets.profile import HardwareSpec, TargetProfile, load_profile, shipped_profiles
from deploy_targets.saved_names import saved_views
from deploy_targets.types import WEIGHTS_FILE
from tests.conftest import TinyModels
from tests.models import save_tokenizer

no_gpu = pytest.mark.skipif(bool(find_gpus()), reason="needs a machine without a GPU")
EXPERTS_KEPT = ("lm_head", r"re:.*\.experts\.")


def on_any_machine(name: str, **scheme: object) -> TargetProfile:
    profile = load_profile(name)
    return profile.model_copy(update={"hardware": HardwareSpec(), "scheme": profile.scheme.model_copy(update=scheme)})


def offenders(profile: TargetProfile, model: Path) -> tuple[str, ...]:
    with pytest.raises(PreflightError) as caught:
        preflight(profile, model)
    return caught.value.offenders


def with_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_saved_views_are_what_transformers_saves(tiny_models: TinyModels) -> None:
    """Names, shapes and values, and writing to a view writes to the parameter."""
    model_dir = tiny_models("qwen3_moe")
    saved = load_file(model_dir / WEIGHTS_FILE)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    views = {name: view for held, tensor in model.named_parameters() for name, view in saved_views(held, tensor.detach(), saved)}
    assert views.keys() == saved.keys()
    assert len(views) > len(dict(model.named_parameters()))
    assert all(torch.equal(views[name], saved[name]) for name in saved)
    views["model.layers.1.mlp.experts.2.up_proj.weight"].fill_(7)
    assert (model.model.layers[1].mlp.experts.gate_up_proj[2, 64:] == 7).all()
    assert int((model.model.layers[1].mlp.experts.gate_up_proj == 7).sum()) == 64 * 128


def test_what_a_file_holds_as_one_stays_one() -> None:
    experts = torch.zeros(4, 6, 2)
    for name, stored in (("layer.experts.gate_up_proj", ["layer.experts.gate_up_proj"]), ("layer.mlp.gate_up_proj", [])):
        assert [held for held, _ in saved_views(name, experts, stored)] == [name]
    assert [held for held, _ in saved_views("a.experts.down_proj", experts, [])] == [f"a.experts.{i}.down_proj.weight" for i in range(4)]


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "llama", "qwen2"])
@pytest.mark.parametrize("target", ["fake", "bf16-transformers", "bf16-vllm"])
def test_supported_families_pass(family: str, target: str, tiny_models: TinyModels) -> None:
    preflight(on_any_machine(target), tiny_models(family))


@pytest.mark.parametrize("target", ["int4-vllm", "fp8-vllm", "int8-vllm"])
def test_fused_layers_are_quantized(target: str, tiny_models: TinyModels) -> None:
    model = tiny_models("phi3")
    preflight(on_any_machine(target), model)
    quantizer = make_quantizer(load_profile(target), model)
    kept = [name for name in load_file(model / WEIGHTS_FILE) if "proj" in name and not quantizer.quantizes(name)]
    assert kept == []


@no_gpu
@pytest.mark.parametrize("target", ["int4-vllm", "fp8-vllm", "int8-vllm"])
def test_quantized_experts_are_refused_on_a_cpu_unless_they_are_kept(target: str, tiny_models: TinyModels) -> None:
    [line] = offenders(on_any_machine(target), tiny_models("qwen3_moe"))
    assert "mixture-of-experts" in line
    assert repr(EXPERTS_KEPT[1])[1:-1].replace("\\\\", "\\") in line
    preflight(on_any_machine(target, ignore=EXPERTS_KEPT), tiny_models("qwen3_moe"))


def test_routers_are_never_quantized_and_engines_are_told(tiny_models: TinyModels, tmp_path: Path) -> None:
    for ignore in (None, ("lm_head",), EXPERTS_KEPT):
        quantizer = make_quantizer(on_any_machine("int4-vllm", ignore=ignore), tiny_models("qwen3_moe"))
        assert not quantizer.quantizes("model.layers.0.mlp.gate.weight")
        assert quantizer.quantizes("model.layers.0.mlp.experts.3.gate_proj.weight") == (ignore != EXPERTS_KEPT)
        quantizer.scaffold(tiny_models("qwen3_moe"), tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
        assert r"re:.*\.(gate|router|shared_expert_gate)$" in written
    dense = make_quantizer(load_profile("int4-vllm"), tiny_models("qwen3"))
    dense.scaffold(tiny_models("qwen3"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]


def test_no_target_quantizes_a_router(tiny_models: TinyModels) -> None:
    """Of those that take the model at all: nowhere in the twin, nor in the file."""
    model_dir = tiny_models("qwen3_moe")
    tensors = load_file(model_dir / WEIGHTS_FILE)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    routers = [name for name in tensors if name.endswith(".mlp.gate.weight")]
    assert len(routers) == 2
    taken = []
    for target in shipped_profiles():
        try:
            quantizer = make_quantizer(load_profile(target), model_dir)
        except PreflightError:
            continue
        if quantizer.offenders(shapes):
            continue
        taken.append(target)
        published = dict(quantizer.quantize(tensors.items()))
        for name in routers:
            assert not quantizer.quantizes(name), target
            assert torch.equal(quantizer.dequantized(name, tensors[name]), tensors[name]), target
            assert torch.equal(published[name].to(torch.bfloat16), tensors[name]), target
    assert {"bf16-transformers", "int4-vllm", "int4-gptq-vllm", "fp8-vllm", "int8-vllm"} <= set(taken)


def test_experts_of_a_layer_are_quantized_together_and_one_by_one(tiny_models: TinyModels) -> None:
    quantizer = make_quantizer(
        on_any_machine("int4-vllm", ignore=("lm_head", "model.layers.0.mlp.experts.1.down_proj")), tiny_models("qwen3_moe")
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tiny_models("qwen3_moe") / WEIGHTS_FILE).items()}
    [line] = quantizer.offenders(shapes)
    assert line.startswith("model.layers.0.mlp.experts: ")
    fused = {name: shape for name, shape in shapes.items() if ".experts." not in name} | {
        "model.layers.0.mlp.experts.down_proj": (4, 128, 64)
    }
    quantizer = make_quantizer(on_any_machine("int4-vllm"), tiny_models("qwen3_moe"))
    [line] = quantizer.offenders(fused)
    assert "one tensor" in line


@no_gpu
def test_vllm_on_a_cpu_is_rebuilt_for_experts(tiny_models: TinyModels) -> None:
    assert is_rebuilt(load_profile("bf16-vllm"), tiny_models("qwen3_moe"))
    assert not is_rebuilt(load_profile("bf16-vllm"), tiny_models("qwen3"))
    assert not is_rebuilt(load_profile("bf16-transformers"), tiny_models("qwen3_moe"))


@no_gpu
def test_vllm_on_a_cpu_is_rebuilt_for_int8_layers(tiny_models: TinyModels) -> None:
    profile = load_profile("int8-vllm")
    assert profile.engine.publish == "in_place"
    assert is_rebuilt(profile, tiny_models("qwen3"))
    assert not is_rebuilt(load_profile("fp8-vllm"), tiny_models("qwen3"))
    assert not is_rebuilt(load_profile("int8-transformers"), tiny_models("qwen3"))


@pytest.mark.parametrize(("target", "family"), [("int8-vllm", "qwen3"), ("bf16-vllm", "qwen3_moe")])
def test_vllm_on_a_gpu_swaps_in_place(target: str, family: Any, nvidia_smi: Callable[..., None], tiny_models: TinyModels) -> None:
    nvidia_smi("NVIDIA L4, 23034 MiB, 8.9")
    assert not is_rebuilt(load_profile(target), tiny_models(family))


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe"])
def test_onnx_refuses_families_without_a_graph_in_one_line(family: str, tiny_models: TinyModels) -> None:
    pytest.importorskip("onnxruntime")
    [line] = offenders(on_any_machine("int4-onnx"), tiny_models(family))
    assert repr(family) in line


@pytest.fixture(scope="module")
def unknown_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GPT-2, whose linear layers are stored [in, out], and Mamba, which has no attention."""
    folder = tmp_path_factory.mktemp("unknown")
    vocab_size = {name: save_tokenizer(folder / name) for name in ("gpt2", "mamba")}
    GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size["gpt2"], n_positions=64, n_embd=64, n_layer=1, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    MambaForCausalLM(MambaConfig(vocab_size=vocab_size["mamba"], hidden_size=64, num_hidden_layers=1)).save_pretrained(folder / "mamba")
    return {name: folder / name for name in vocab_size}


@pytest.mark.parametrize("target", ["bf16-transformers", "bf16-vllm", "int4-vllm", "int4-onnx"])
@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_unknown_families_are_refused_in_one_line(family: str, target: str, unknown_models: dict[str, Path]) -> None:
    [line] = offenders(on_any_machine(target), unknown_models[family])
    assert line.startswith(f"model_type {family!r} is not supported: ")
    assert "model.embed_tokens.weight" in line


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"model_type": "llava", "vision_config": {"hidden_size": 8}}, "vision_config, a model of several modalities"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "it has an encoder"),
        ({"num_hidden_layers": 4}, "layers 2, 3 have no self_attn"),
    ],
)
def test_other_kinds_of_models_are_refused_in_one_line(
    changes: dict[str, Any], fragment: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    [line] = offenders(on_any_machine("int4-vllm"), with_config(tiny_models("qwen3"), tmp_path / "model", **changes))
    assert "is not supported" in line
    assert fragment in line


def test_long_rope_beyond_its_short_factors_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0], "long_factor": [2.0]}

    def model(name: str, **changes: Any) -> Path:
        return with_config(tiny_models("phi3"), tmp_path / name, max_position_embeddings=4096, **changes)

    preflight(on_any_machine("bf16-vllm"), model("short", rope_parameters={**rope, "original_max_position_embeddings": 1025}))
    [line] = offenders(on_any_machine("bf16-vllm"), model("long", rope_parameters={**rope, "original_max_position_embeddings": 1024}))
    assert "max_model_len to at most 1023" in line
    # As files of before transformers 5 have it.
    old = model("old", rope_parameters=None, rope_scaling={"type": "su"}, original_max_position_embeddings=512)
    assert "at most 511" in offenders(on_any_machine("bf16-transformers"), old)[0]


def test_a_file_that_transformers_renames_otherwise_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    shutil.copytree(tiny_models("qwen3_moe"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS_FILE)
    tensors["model.layers.0.mlp.experts.9.down_proj.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model" / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(EngineError):
        TransformersEngine(tmp_path / "model", {}, weight_version=1)
