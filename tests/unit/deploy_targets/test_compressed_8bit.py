"""FP8_DYNAMIC, FP8_BLOCK and W8A8: what is stored, what the package decompresses, the nearest values of the grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deploy_targets.errors import ProfileError
from deploy_targets.profile import SchemeSpec
from deploy_targets.quantizers.compressed_tensors import CompressedTensorsQuantizer
from deploy_targets.quantizers.compressed_weights import quantize_float8, quantize_float8_blocks, quantize_int8
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels
from tests.contract.targets import rounded_per_token

SHAPE = (256, 384)
STORED: dict[str, tuple[torch.dtype, tuple[int, int]]] = {
    "FP8_DYNAMIC": (torch.float8_e4m3fn, (256, 1)),
    "FP8_BLOCK": (torch.float8_e4m3fn, (2, 3)),
    "W8A8": (torch.int8, (256, 1)),
}
"""Scheme -> dtype of the weight, shape of its scales."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "FP8_DYNAMIC": {"type": "float", "strategy": "channel"},
    "FP8_BLOCK": {"type": "float", "strategy": "block", "block_structure": [128, 128]},
    "W8A8": {"type": "int", "strategy": "channel"},
}


def quantizer(name: str, **changes: object) -> CompressedTensorsQuantizer:
    scheme = SchemeSpec.model_validate({"quantizer": "compressed-tensors", "name": name, "bits": 8, **changes})
    return CompressedTensorsQuantizer(scheme, {})


def random_weight(rows: int = SHAPE[0], columns: int = SHAPE[1]) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("name", STORED)
def test_dequantized_is_what_compressed_tensors_decompresses(name: str) -> None:
    weight, made = random_weight(), quantizer(name)
    state = {key.removeprefix("p."): tensor for key, tensor in made.quantize([("p.weight", weight)])}
    dtype, scale_shape = STORED[name]
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()} == {
        "weight": (dtype, SHAPE),
        "weight_scale": (torch.float32, scale_shape),
    }
    arguments = QuantizationArgs(num_bits=8, symmetric=True, **ARGUMENTS[name])
    compressor = IntQuantizationCompressor if name == "W8A8" else FloatQuantizationCompressor
    decompressed = compressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=arguments))["weight"]
    assert torch.equal(made.dequantized("p.weight", weight), decompressed.to(torch.bfloat16))


def float8_grid() -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return codes[codes.isfinite()]


def test_fp8_values_are_the_nearest_of_the_grid() -> None:
    weight = random_weight(8, 64)
    values, scales = quantize_float8(weight)
    distance = (weight.float()[..., None] / scales[..., None] - float8_grid()).abs()
    assert torch.allclose((weight.float() / scales - values.float()).abs(), distance.amin(-1), atol=1e-6)
    assert torch.equal(values.float().abs().amax(1), torch.full((8,), 448.0))


def test_every_block_of_fp8_has_its_own_scale() -> None:
    weight = random_weight()
    weight[128:, :128] *= 100
    values, scales = quantize_float8_blocks(weight, 128)
    for row, column in ((0, 0), (1, 0), (1, 2)):
        block = weight[128 * row :, 128 * column :][:128, :128].float()
        assert scales[row, column] == block.abs().max() / 448
        made = values[128 * row :, 128 * column :][:128, :128].float()
        distance = (block[..., None] / scales[row, column] - float8_grid()).abs()
        assert torch.allclose((block / scales[row, column] - made).abs(), distance.amin(-1), atol=1e-5)


def test_int8_values_are_the_nearest_of_the_grid() -> None:
    weight = random_weight(8, 64)
    values, scales = quantize_int8(weight)
    assert torch.equal(values, (weight.float() / scales).round().to(torch.int8))
    assert torch.equal(values.abs().amax(1), torch.full((8,), 127, dtype=torch.int8))


@pytest.mark.parametrize("quantize", [quantize_float8, quantize_int8, lambda weight: quantize_float8_blocks(weight, 128)])
def test_zeros_stay_zeros(quantize: Any) -> None:
    zeros, scales = quantize(torch.zeros(128, 128, dtype=torch.bfloat16))
    assert not zeros.float().any()
    assert torch.equal(scales, torch.ones_like(scales))


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8"])
def test_transformers_loads_the_folder(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    # compressed-tensors 0.17 takes the scales of a matrix that is one block wide or high for those of channels or groups.
    model_dir = tiny_models("qwen3", hidden_size=256, num_heads=8, num_kv_heads=8)
    scheme = SchemeSpec(quantizer="compressed-tensors", name=name, bits=8)
    made = CompressedTensorsQuantizer(scheme, json.loads((model_dir / "config.json").read_text()))
    tensors = load_file(model_dir / "model.safetensors")
    assert made.offenders({key: tuple(tensor.shape) for key, tensor in tensors.items()}) == []
    write_weights(tmp_path / "model.safetensors", made.quantize(tensors.items()), 4 * len(tensors))
    made.scaffold(model_dir, tmp_path)
    served, unrounded, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path, model_dir, model_dir)
    )
    for key, parameter in reference.named_parameters():
        parameter.data = made.dequantized(key, parameter.data)
    for key, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and made.quantizes(f"{key}.weight"):
            module.register_forward_pre_hook(lambda module, inputs: (rounded_activations(name, inputs[0]),))
    tokens = torch.randint(3, 36, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logps, reference_logps, unrounded_logps = (model(tokens).logits.log_softmax(-1) for model in (served, reference, unrounded))
    gap, gap_unrounded = (logps - reference_logps).abs().mean(), (logps - unrounded_logps).abs().mean()
    assert gap < gap_unrounded / 10


def rounded_activations(scheme: str, activations: torch.Tensor) -> torch.Tensor:
    """What transformers multiplies with: the grid has one scale for each token, FP8_BLOCK one for each 128 channels of it."""
    if scheme == "FP8_DYNAMIC":
        return rounded_per_token(scheme, activations)
    if scheme == "FP8_BLOCK":
        return rounded_per_token("FP8_DYNAMIC", activations.unflatten(-1, (-1, 128))).flatten(-2)
    # compressed-tensors spans -128 to 127 evenly, kernels -127 to 127.
    scale = activations.abs().amax(-1, keepdim=True) / 127.5
    return (activations / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("FP8_DYNAMIC", {"bits": 4}, "FP8_DYNAMIC has 8 bits"),
        ("FP8_DYNAMIC", {"group_size": 32}, "one scale per channel"),
        ("FP8_BLOCK", {"group_size": 32}, "128 x 128"),
        ("W8A8", {"group_size": 32}, "one scale per channel"),
        ("W2A2", {}, "W2A2"),
    ],
)
def test_profiles_that_make_no_sense(name: str, changes: dict[str, object], named: str) -> None:
    with pytest.raises(ProfileError, match=named):
        quantizer(name, **changes)


def test_sizes_that_are_no_whole_blocks_are_offenders() -> None:
    found = quantizer("FP8_BLOCK").offenders({"model.layers.0.mlp.down_proj.weight": (64, 192)})
    assert len(found) == 3
    assert any("input size 192" in line for line in found)
    assert any("output size 64" in line for line in found)


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "W8A8"])
def test_inputs_are_rounded_token_by_token(name: str) -> None:
    """Each token on a grid of its own that ends at its largest value; against a search over the grid, value by value."""
    activations = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.01])[:, None]
    activations[1, 2] = 0.0
    grid = float8_grid() / 448 if name == "FP8_DYNAMIC" else torch.arange(-127, 128) / 127
    rounded = quantizer(name).rounded_inputs("p.weight", activations)
    assert rounded.shape == activations.shape
    assert rounded.dtype == activations.dtype
    for row, found in zip(activations.to(torch.bfloat16).float().view(-1, 64), rounded.view(-1, 64), strict=True):
        candidates = grid * row.abs().max()
        best = (row[:, None] - candidates).abs().amin(-1)
        assert torch.allclose((row - found).abs(), best, atol=1e-6 * float(row.abs().max()))


def test_schemes_that_leave_activations_alone() -> None:
    activations = torch.randn(4, 128)
    blocks = quantizer("FP8_BLOCK")
    assert not blocks.rounds_inputs
    assert torch.equal(blocks.rounded_inputs("p.weight", activations), activations)
    assert quantizer("W8A8").rounds_inputs
