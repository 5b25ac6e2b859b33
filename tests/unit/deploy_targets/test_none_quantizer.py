"""The quantizer that changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deploy_targets.errors import ArtifactError, ProfileError, WeightsError
from deploy_targets.profile import SchemeSpec
from deploy_targets.quantizers.none import NoQuantizer
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels


def test_tensors_pass_through_in_order_and_a_tied_head_is_left_out() -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(2, 2), "model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}
    untied = NoQuantizer(SchemeSpec(quantizer="none"), {"tie_word_embeddings": False})
    assert list(untied.quantize(tensors.items())) == list(tensors.items())
    tied = NoQuantizer(SchemeSpec(quantizer="none"), {"tie_word_embeddings": True})
    assert [name for name, _ in tied.quantize(tensors.items())] == ["model.embed_tokens.weight", "model.norm.weight"]
    assert tied.dequantized("model.norm.weight", tensors["model.norm.weight"]) is tensors["model.norm.weight"]
    assert not tied.quantizes("model.norm.weight")
    assert tied.offenders({"x": (3,)}) == []


def test_the_scaffold_and_the_weights_are_the_model_again(tiny_models: TinyModels, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = tiny_models("llama")
    quantizer = NoQuantizer(SchemeSpec(quantizer="none"), {})
    tensors = load_file(model_dir / "model.safetensors")
    write_weights(tmp_path / "model.safetensors", quantizer.quantize(tensors.items()), len(tensors) + 1)
    quantizer.scaffold(model_dir, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert AutoTokenizer.from_pretrained(tmp_path).encode("12+3") == AutoTokenizer.from_pretrained(model_dir).encode("12+3")


def test_settings_without_effect_are_refused_all_at_once() -> None:
    with pytest.raises(ProfileError) as caught:
        NoQuantizer(SchemeSpec(quantizer="none", name="W4A16", bits=4, group_size=32, symmetric=False, ignore=()), {})
    keys = [line.split(":")[0].removeprefix("scheme.") for line in caught.value.offenders]
    assert keys == ["bits", "group_size", "symmetric", "ignore", "name"]


def test_a_scheme_name_that_promises_quantization_is_refused() -> None:
    with pytest.raises(ProfileError, match="got 'W4A16'"):
        NoQuantizer(SchemeSpec(quantizer="none", name="W4A16"), {})


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json"):
        NoQuantizer(SchemeSpec(quantizer="none"), {}).scaffold(tmp_path, tmp_path)


def test_fp16_rounds_once_and_says_so_in_the_config(tiny_models: TinyModels, tmp_path: Path) -> None:
    made = NoQuantizer(SchemeSpec(quantizer="none", name="FP16"), {})
    weight = torch.tensor([1.0, 2.0**-26, 3.0], dtype=torch.bfloat16)
    ((_, stored),) = made.quantize([("x.weight", weight)])
    assert stored.dtype == torch.float16
    assert torch.equal(made.dequantized("x.weight", weight), torch.tensor([1.0, 0.0, 3.0], dtype=torch.bfloat16))
    made.scaffold(tiny_models("llama"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_weights_beyond_fp16_never_reach_a_file(tmp_path: Path) -> None:
    made = NoQuantizer(SchemeSpec(quantizer="none", name="FP16"), {})
    with pytest.raises(WeightsError, match=r"x\.weight"):
        write_weights(tmp_path / "model.safetensors", made.quantize([("x.weight", torch.tensor([1e5]))]), 4)
    assert not list(tmp_path.iterdir())
