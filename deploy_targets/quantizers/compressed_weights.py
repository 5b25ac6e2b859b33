"""The 8-bit weights of one layer in the formats of compressed-tensors: what is stored, and what the kernels multiply with.

Format: https://github.com/vllm-project/compressed-tensors. Each class is one scheme, named as vLLM and llm-compressor write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs

from deploy_targets.quantizers.int4_packed import Int4Weights

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec

_FLOAT8 = torch.float8_e4m3fn


class Float8Weights:
    """FP8_DYNAMIC: FP8 (e4m3) weights with one float32 scale per output channel; activations in FP8, a scale per token found as they come.

    A weight [out, in] becomes `weight` float8_e4m3fn [out, in] and `weight_scale` float32 [out, 1].
    """

    bits = 8
    tile = 1
    format: ClassVar = CompressionFormat.float_quantized
    group_size: int | None = None

    def __init__(self, scheme: SchemeSpec) -> None:
        """There is nothing to choose."""

    @staticmethod
    def problems(scheme: SchemeSpec) -> list[str]:
        """Keys of the profile that this scheme cannot have."""
        return [] if scheme.group_size is None else [f"scheme.group_size: FP8 has one scale per channel (got {scheme.group_size})"]

    def encode(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is stored for the weight `name`."""
        values, scales = quantize_float8(weight)
        yield name, values
        yield f"{name}_scale", scales

    def decode(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """FP8 value times scale; see `inputs` for the activations."""
        values, scales = quantize_float8(weight)
        return (values.float() * scales).to(weight.dtype)

    def inputs(self, activations: torch.Tensor) -> torch.Tensor:
        """What the kernels make of the activations [..., in]: FP8 value times the scale of the token."""
        values, scales = quantize_float8(_tokens(activations))
        return (values.float() * scales).view(activations.shape).to(activations.dtype)

    def arguments(self) -> tuple[QuantizationArgs, QuantizationArgs | None]:
        """What `config.json` says of weights and of activations."""
        return (
            QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel"),
            QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True),
        )


class Float8BlockWeights:
    """FP8_BLOCK: FP8 (e4m3) weights with one float32 scale per block of 128 x 128; activations in FP8, a scale per token and 128 channels.

    A weight [out, in] becomes `weight` float8_e4m3fn [out, in] and `weight_scale` float32 [out / 128, in / 128]. vLLM's CPU
    kernel leaves the activations in bf16.
    """

    bits = 8
    tile = 128
    """Of merged layers every part but the last has to end with a block; here all sizes do."""
    format: ClassVar = CompressionFormat.float_quantized

    def __init__(self, scheme: SchemeSpec) -> None:
        """There is nothing to choose."""
        self.group_size = self.tile

    @staticmethod
    def problems(scheme: SchemeSpec) -> list[str]:
        """Keys of the profile that this scheme cannot have."""
        return [] if scheme.group_size in (None, 128) else [f"scheme.group_size: the blocks are 128 x 128 (got {scheme.group_size})"]

    def encode(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is stored for the weight `name`."""
        values, scales = quantize_float8_blocks(weight, self.tile)
        yield name, values
        yield f"{name}_scale", scales

    def decode(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """FP8 value times scale; the rounding of the activations is the engine's own and is not in it."""
        values, scales = quantize_float8_blocks(weight, self.tile)
        return (values.float() * _spread(scales, self.tile)).to(weight.dtype)

    def arguments(self) -> tuple[QuantizationArgs, QuantizationArgs | None]:
        """What `config.json` says of weights and of activations."""
        block = [self.tile, self.tile]
        return (
            QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="block", block_structure=block),
            QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="group", group_size=self.tile, dynamic=True),
        )


class Int8Weights:
    """W8A8: INT8 weights with one float32 scale per output channel; activations in INT8, a scale per token found as they come.

    A weight [out, in] becomes `weight` int8 [out, in] and `weight_scale` float32 [out, 1].
    """

    bits = 8
    tile = 1
    format: ClassVar = CompressionFormat.int_quantized
    group_size: int | None = None

    def __init__(self, scheme: SchemeSpec) -> None:
        """There is nothing to choose."""

    @staticmethod
    def problems(scheme: SchemeSpec) -> list[str]:
        """Keys of the profile that this scheme cannot have."""
        return [] if scheme.group_size is None else [f"scheme.group_size: W8A8 has one scale per channel (got {scheme.group_size})"]

    def encode(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is stored for the weight `name`."""
        values, scales = quantize_int8(weight)
        yield name, values
        yield f"{name}_scale", scales

    def decode(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """INT8 value times scale; see `inputs` for the activations."""
        values, scales = quantize_int8(weight)
        return (values.float() * scales).to(weight.dtype)

    def inputs(self, activations: torch.Tensor) -> torch.Tensor:
        """What the kernels make of the activations [..., in]: INT8 value times the scale of the token."""
        values, scales = quantize_int8(_tokens(activations))
        return (values.float() * scales).view(activations.shape).to(activations.dtype)

    def arguments(self) -> tuple[QuantizationArgs, QuantizationArgs | None]:
        """What `config.json` says of weights and of activations."""
        return (
            QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel"),
            QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True),
        )


WeightScheme = Int4Weights | Float8Weights | Float8BlockWeights | Int8Weights
SCHEMES: dict[str, type[WeightScheme]] = {
    "W4A16": Int4Weights,
    "W8A8": Int8Weights,
    "FP8_DYNAMIC": Float8Weights,
    "FP8_BLOCK": Float8BlockWeights,
}


def quantize_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest FP8 values of `weight` [out, in] and the scale of each row: float8_e4m3fn [out, in] and float32 [out, 1].

    The scale is absmax / 448, the largest e4m3 value; a row of zeros has scale 1.
    """
    rows = weight.detach().float()
    scales = rows.abs().amax(dim=1, keepdim=True) / torch.finfo(_FLOAT8).max
    scales = _without_zeros(scales)
    largest = torch.finfo(_FLOAT8).max
    return (rows / scales).clamp_(-largest, largest).to(_FLOAT8), scales


def quantize_float8_blocks(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest FP8 values of `weight` [out, in] and the scale of each `block` x `block` of it, sizes being multiples of `block`.

    Returns float8_e4m3fn [out, in] and float32 [out / block, in / block]; the scale is absmax / 448, 1 for a block of zeros.
    """
    largest = torch.finfo(_FLOAT8).max
    num_rows, num_columns = weight.shape
    blocks = weight.detach().float().view(num_rows // block, block, num_columns // block, block)
    scales = blocks.abs().amax(dim=(1, 3)) / largest
    scales = _without_zeros(scales)
    scaled = blocks / scales[:, None, :, None]
    return scaled.clamp_(-largest, largest).to(_FLOAT8).view(weight.shape), scales


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest INT8 values of `weight` [out, in] in [-127, 127] and the scale of each row: int8 [out, in] and float32 [out, 1].

    The scale is absmax / 127; a row of zeros has scale 1.
    """
    rows = weight.detach().float()
    scales = rows.abs().amax(dim=1, keepdim=True) / 127
    scales = _without_zeros(scales)
    return (rows / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def _tokens(activations: torch.Tensor) -> torch.Tensor:
    """One row per token, in the bf16 that the kernels are given."""
    return activations.detach().to(torch.bfloat16).flatten(0, -2)


def _spread(scales: torch.Tensor, block: int) -> torch.Tensor:
    """The scale of each value [out, in] from those of its blocks [out / block, in / block]."""
    return scales.repeat_interleave(block, dim=0).repeat_interleave(block, dim=1)


def _without_zeros(scales: torch.Tensor) -> torch.Tensor:
    """1 in place of 0. NaN stays NaN: that is how weights that are not finite are found out before they are published."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
