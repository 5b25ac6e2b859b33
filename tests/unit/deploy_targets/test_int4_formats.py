"""The three INT4 files: unpacked bit by bit as their readers do, they are what `dequantized` says; and what does not fit them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deploy_targets.catalog import make_quantizer, resolve
from deploy_targets.errors import ProfileError, WeightsError
from deploy_targets.profile import SchemeSpec, load_profile, parse_profile, profile_text
from deploy_targets.protocols import CalibratedQuantizer
from deploy_targets.quantizers.int4_formats import awq_gemm, gptq_v1, pack_quantized
from deploy_targets.quantizers.int4_grid import Grid, Int4Matrix
from deploy_targets.quantizers.linear_quantizer import LinearQuantizer
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels
from tests.contract.targets import uneven_grams

UP = "model.layers.0.mlp.up_proj.weight"
AWQ_BITS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word hold the first, second, ... of eight neighbours, as vLLM and AutoAWQ read them."""
WAYS = [("rtn", False), ("gptq", False), ("gptq", True), ("awq", False)]


def scheme(quantizer: str, **changes: Any) -> SchemeSpec:
    return SchemeSpec.model_validate({"quantizer": quantizer, "name": "W4A16", "bits": 4, "group_size": 32, **changes})


def made(quantizer: str, config: Mapping[str, Any] | None = None, **changes: Any) -> LinearQuantizer:
    found = resolve("quantizer", quantizer, "")(scheme(quantizer, **changes), {"model_type": "qwen3", **(config or {})})
    assert isinstance(found, LinearQuantizer)
    return found


def random_matrix(rows: int = 64, columns: int = 96, group_size: int = 32) -> Int4Matrix:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, columns // group_size)
    grid = Grid(torch.rand(shape, generator=generator).bfloat16().float(), torch.randint(16, shape, generator=generator).float())
    return Int4Matrix(torch.randint(16, (rows, columns), generator=generator).to(torch.uint8), grid)


def bits(words: torch.Tensor, place: int) -> torch.Tensor:
    return (words >> (4 * place)) & 15


def read_gptq(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 [out, in], number by number."""
    num_inputs, num_outputs = stored["g_idx"].numel(), stored["scales"].shape[1]
    weight = torch.empty(num_outputs, num_inputs)
    for column in range(num_inputs):
        group = int(stored["g_idx"][column])
        zeros = torch.stack([bits(stored["qzeros"][group], place) for place in range(8)], dim=1).flatten() + 1
        weight[:, column] = (bits(stored["qweight"][column // 8], column % 8) - zeros) * stored["scales"][group].float()
    return weight


def read_awq(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 [out, in], number by number."""
    num_inputs, num_outputs = stored["qweight"].shape[0], stored["scales"].shape[1]
    group_size = num_inputs // len(stored["scales"])
    weight = torch.empty(num_outputs, num_inputs)
    for row in range(num_outputs):
        word, place = row // 8, AWQ_BITS[row % 8]
        zeros = bits(stored["qzeros"][:, word], place).repeat_interleave(group_size)
        weight[row] = (bits(stored["qweight"][:, word], place) - zeros) * stored["scales"][:, row].float().repeat_interleave(group_size)
    return weight


READERS = {"autogptq": read_gptq, "autoawq": read_awq}


def test_layouts_hold_every_number() -> None:
    matrix = random_matrix()
    wanted = (matrix.values.view(64, 3, 32).float() - matrix.grid.zeros[..., None]) * matrix.grid.scales[..., None]
    symmetric = Int4Matrix(matrix.values, Grid(matrix.grid.scales, torch.full_like(matrix.grid.zeros, 8)))
    assert torch.equal(read_awq(dict(awq_gemm(matrix))), wanted.view(64, 96))
    stored = dict(gptq_v1(symmetric))
    assert torch.equal(read_gptq(stored), ((matrix.values.view(64, 3, 32).float() - 8) * matrix.grid.scales[..., None]).view(64, 96))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "qweight": (torch.int32, (12, 64)),
        "qzeros": (torch.int32, (3, 8)),
        "scales": (torch.float16, (3, 64)),
        "g_idx": (torch.int32, (96,)),
    }
    assert (stored["qzeros"] == 0x77777777).all()


def test_pack_quantized_is_packed_as_the_package_does() -> None:
    matrix = random_matrix()
    stored = dict(pack_quantized(matrix, symmetric=False))
    assert torch.equal(stored["weight_packed"], pack_to_int32(matrix.values.to(torch.int8) - 8, 4))
    zeros = matrix.grid.zeros.to(torch.int8) - 8
    assert torch.equal(stored["weight_zero_point"], pack_to_int32(zeros, 4, packed_dim=0))
    assert "weight_zero_point" not in dict(pack_quantized(matrix, symmetric=True))


@pytest.mark.parametrize(("algorithm", "act_order"), WAYS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_compressed_tensors_decompresses_what_dequantized_says(
    group_size: int | None, symmetric: bool, algorithm: str, act_order: bool
) -> None:
    tensors = model_tensors()
    quantizer = made("compressed-tensors", group_size=group_size, symmetric=symmetric, algorithm=algorithm, act_order=act_order)
    quantizer.calibrate(tensors.items(), uneven_grams(quantizer, tensors))
    stored = dict(quantizer.quantize(tensors.items()))
    strategy = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, group_size=group_size)
    for name in filter(quantizer.quantizes, tensors):
        module = name.removesuffix("weight")
        state = {key.removeprefix(module): tensor for key, tensor in stored.items() if key.startswith(module)}
        served = PackedQuantizationCompressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
        assert torch.equal(quantizer.dequantized(name, tensors[name]), unfolded(stored, tensors, name, served))


@pytest.mark.parametrize(("algorithm", "act_order"), WAYS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("name", ["autogptq", "autoawq"])
def test_the_file_holds_what_dequantized_says(name: str, clip: str, symmetric: bool, algorithm: str, act_order: bool) -> None:
    if name == "autogptq" and not symmetric:
        with pytest.raises(ProfileError, match=r"scheme\.symmetric"):
            made(name, symmetric=False)
        return
    tensors = model_tensors()
    quantizer = made(name, symmetric=symmetric, algorithm=algorithm, clip=clip, act_order=act_order)
    plain = {key: quantizer.dequantized(key, tensor) for key, tensor in tensors.items()}
    assert quantizer.needs_calibration == (algorithm != "rtn")
    quantizer.calibrate(tensors.items(), uneven_grams(quantizer, tensors))
    stored = dict(quantizer.quantize(tensors.items()))
    for key in filter(quantizer.quantizes, tensors):
        module = key.removesuffix("weight")
        served = READERS[name]({part.removeprefix(module): tensor for part, tensor in stored.items() if part.startswith(module)})
        made_of = quantizer.dequantized(key, tensors[key])
        assert torch.equal(made_of, unfolded(stored, tensors, key, served.bfloat16()))
        assert torch.equal(made_of, plain[key]) == (algorithm == "rtn" or (algorithm == "awq" and clip == "absmax" and "o_proj" in key))
        assert torch.equal(quantizer.dequantized(key, tensors[key].float()), made_of.float())
    assert {part: tensor for part, tensor in stored.items() if part.endswith(("lm_head.weight", "embed_tokens.weight"))}.keys() == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def unfolded(stored: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], name: str, served: torch.Tensor) -> torch.Tensor:
    """`served` as it acts on what the layer's inputs were before anything was folded, by the norms of the file and of the model."""
    layer = name.split(".self_attn.")[0].split(".mlp.")[0]
    norm = "input_layernorm" if "self_attn" in name else "post_attention_layernorm"
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
        served = served * (stored[f"{layer}.{norm}.weight"] / tensors[f"{layer}.{norm}.weight"])
    bias = f"{layer}.mlp.up_proj.bias"
    scale = (tensors[bias] / stored[bias]) if "mlp" in name else None
    if name.endswith("up_proj.weight"):
        served = served * scale[:, None]
    if name.endswith("down_proj.weight"):
        served = served / scale
    return served


def model_tensors() -> dict[str, torch.Tensor]:
    """One layer with shared heads, a bias on up_proj that shows what was folded there, an embedding and a head."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "model.embed_tokens.weight": (40, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.self_attn.v_proj.weight": (32, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.mlp.gate_proj.weight": (128, 64),
        UP: (128, 64),
        "model.layers.0.mlp.up_proj.bias": (128,),
        "model.layers.0.mlp.down_proj.weight": (64, 128),
        "lm_head.weight": (40, 64),
    }
    return {name: (0.05 * torch.randn(shape, generator=generator) + (len(shape) == 1)).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["int4-gptq-vllm", "int4-awq-vllm"])
def test_the_same_calibration_gives_the_same_bytes_and_another_gives_others(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir, profile = tiny_models("qwen3"), load_profile(name)
    tensors = load_file(model_dir / "model.safetensors")

    def written(scale: float) -> bytes:
        quantizer = make_quantizer(profile, model_dir)
        assert isinstance(quantizer, CalibratedQuantizer)
        grams = {key: gram + scale * torch.diag(torch.arange(len(gram)).float()) for key, gram in uneven_grams(quantizer, tensors).items()}
        quantizer.calibrate(tensors.items(), grams)
        write_weights(tmp_path / "w.safetensors", quantizer.quantize(tensors.items()), 8 * len(tensors))
        return (tmp_path / "w.safetensors").read_bytes()

    first = written(0.0)
    assert written(0.0) == first
    assert written(10.0) != first


@pytest.mark.parametrize("quantizer", ["autogptq", "autoawq"])
def test_what_config_json_says(quantizer: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("llama")
    kept = "model.layers.1.mlp.down_proj"
    maker = made(quantizer, ignore=("lm_head", kept), group_size=None)
    tensors = load_file(model_dir / "model.safetensors")
    write_weights(tmp_path / "model.safetensors", maker.quantize(tensors.items()), 8 * len(tensors))
    maker.scaffold(model_dir, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (said["bits"], said["group_size"]) == (4, -1)
    if quantizer == "autogptq":
        assert (said["quant_method"], said["sym"], said["desc_act"]) == ("gptq", True, False)
        assert said["dynamic"] == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}
    else:
        assert (said["quant_method"], said["version"], said["zero_point"]) == ("awq", "gemm", True)
        assert said["modules_to_not_convert"] == ["lm_head", kept]


def test_gptq_in_compressed_tensors_is_a_profile_of_ones_own_and_transformers_reads_it(tiny_models: TinyModels, tmp_path: Path) -> None:
    text = 'name = "mine"\ndescription = "mine"\nextends = "int4-vllm"\n[scheme]\nalgorithm = "gptq"\nsymmetric = false\n'
    model_dir = tiny_models("qwen3")
    quantizer = make_quantizer(parse_profile(text, "mine.toml"), model_dir)
    assert isinstance(quantizer, CalibratedQuantizer)
    tensors = load_file(model_dir / "model.safetensors")
    quantizer.calibrate(tensors.items(), uneven_grams(quantizer, tensors))
    write_weights(tmp_path / "model.safetensors", quantizer.quantize(tensors.items()), 8 * len(tensors))
    quantizer.scaffold(model_dir, tmp_path)
    served, reference = AutoModelForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(model_dir)
    tokens = torch.randint(3, 36, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(quantizer.dequantized(name, parameter))
        assert torch.equal(served(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_inputs_that_are_not_finite_are_refused_with_the_layer(algorithm: str) -> None:
    tensors, quantizer = model_tensors(), made("autoawq", algorithm=algorithm)
    grams = uneven_grams(quantizer, tensors)
    grams[UP][3, 4] = float("nan")
    with pytest.raises(WeightsError, match="up_proj"):
        quantizer.calibrate(tensors.items(), grams)


@pytest.mark.parametrize(
    ("quantizer", "changes", "named"),
    [
        ("autogptq", {"bits": 8, "name": "W8A16"}, ["scheme.name", "scheme.bits"]),
        ("autoawq", {"act_order": True, "group_size": 33}, ["scheme.group_size", "scheme.act_order"]),
        ("compressed-tensors", {"act_order": True}, ["scheme.act_order"]),
        ("compressed-tensors", {"name": "W8A8", "bits": 8, "group_size": None, "algorithm": "gptq", "clip": "mse"},
         ["scheme.algorithm", "scheme.clip"]),
        ("none", {"name": "BF16", "bits": 16, "group_size": None, "algorithm": "awq"}, ["scheme.algorithm"]),
    ],
)  # fmt: skip
def test_schemes_that_cannot_be_made_are_refused(
    quantizer: str, changes: dict[str, Any], named: list[str], tiny_models: TinyModels
) -> None:
    profile = load_profile("int4-vllm").model_copy(update={"scheme": scheme(quantizer, **changes)})
    with pytest.raises(ProfileError) as caught:
        make_quantizer(profile, tiny_models("qwen3"))
    assert [line.split(":")[0] for line in caught.value.offenders] == named


def test_models_and_heads_that_do_not_fit_are_offenders() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors().items()}
    assert made("autoawq", algorithm="awq").offenders(shapes) == []
    (line,) = made("autoawq", {"model_type": "gemma3_text"}, algorithm="awq").offenders(shapes)
    assert "gemma3_text" in line
    assert made("autoawq", {"model_type": "gemma3_text"}, algorithm="gptq").offenders(shapes) == []
    (line,) = made("autogptq", ignore=()).offenders({**shapes, "lm_head.weight": (64, 64)})
    assert line.startswith("lm_head: readers of this format")


def test_shipped_profiles_are_calibrated_and_the_others_are_not(tiny_models: TinyModels) -> None:
    assert "act_order = true" in profile_text("int4-gptq-vllm")
    for name, calibrated in {"int4-gptq-vllm": True, "int4-awq-vllm": True, "int4-vllm": False, "fp8-vllm": False}.items():
        quantizer = make_quantizer(load_profile(name), tiny_models("qwen3"))
        assert isinstance(quantizer, CalibratedQuantizer)
        assert quantizer.needs_calibration == calibrated
