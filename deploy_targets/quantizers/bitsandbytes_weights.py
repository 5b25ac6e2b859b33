"""The weights of one layer as bitsandbytes stores them, and what its layers multiply with.

Each class is one scheme; the tensors are those that transformers saves for a model it quantized by `BitsAndBytesConfig`.
Every function of bitsandbytes called here is public (`bitsandbytes.functional`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from deploy_targets.quiet_bitsandbytes import bitsandbytes

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What `bitsandbytes.functional.quantize_4bit` takes."""
_ROWS = 32
"""bitsandbytes packs NF4 for CPUs with AVX512-BF16 in tiles of this many output rows, and stops at layers that do not fill them."""


class Nf4Weights:
    """NF4 (QLoRA, arXiv 2305.14314): 4-bit quantiles of a normal distribution, one float32 absmax per block of input channels.

    A weight [out, in] becomes `weight` uint8 [out * in / 2, 1], `weight.absmax` float32 [out * in / block], `weight.quant_map`
    float32 [16] and `weight.quant_state.bitsandbytes__nf4` uint8 (JSON: block size, dtype, shape). No double quantization.
    """

    bits = 4

    def __init__(self, scheme: SchemeSpec) -> None:
        """`group_size` None is bitsandbytes' default block of 64."""
        self.block_size = scheme.group_size or 64

    @staticmethod
    def problems(scheme: SchemeSpec) -> list[str]:
        """Keys of the profile that this scheme cannot have."""
        if scheme.group_size is None or scheme.group_size in _BLOCK_SIZES:
            return []
        return [f"scheme.group_size: the blocks of NF4 are {', '.join(map(str, _BLOCK_SIZES))} (got {scheme.group_size})"]

    def shape_problems(self, shape: tuple[int, ...]) -> list[str]:
        """Why a matrix [out, in] of this shape cannot be stored or served."""
        found = []
        if shape[1] % self.block_size:
            found.append(f"blocks of {self.block_size} do not divide the input size {shape[1]}")
        if shape[0] % _ROWS:
            found.append(f"the output size {shape[0]} is no multiple of {_ROWS}, which bitsandbytes' CPU kernel needs")
        return found

    def encode(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is stored for the tensor `name`."""
        values, state = self._quantize(weight)
        yield name, values
        for key, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{key}", tensor

    def decode(self, weight: torch.Tensor) -> torch.Tensor:
        """Quantile times absmax, rounded to bf16."""
        made: torch.Tensor = bitsandbytes.functional.dequantize_4bit(*self._quantize(weight))
        return made.to(weight.dtype)

    def _quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
        # From bf16, whatever the learner keeps: the absmax of a block is then a bf16 number, and no reader that rounds it changes it.
        rows = weight.detach().to(torch.bfloat16).contiguous()
        values, state = bitsandbytes.functional.quantize_4bit(rows, blocksize=self.block_size, compress_statistics=False, quant_type="nf4")
        return values, state

    def arguments(self) -> Mapping[str, Any]:
        """What transformers' `BitsAndBytesConfig` says of this scheme."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": False,
        }


class LlmInt8Weights:
    """LLM.int8() (arXiv 2208.07339): INT8 rows with one absmax each; activations INT8 per token, but for columns with outliers.

    A weight [out, in] becomes `weight` int8 [out, in], `SCB` float32 [out] (the absmax) and `weight_format` uint8 [] (0: row-major).
    The outlier threshold is transformers' default, 6.
    """

    bits = 8

    def __init__(self, scheme: SchemeSpec) -> None:
        """There is nothing to choose."""

    @staticmethod
    def problems(scheme: SchemeSpec) -> list[str]:
        """Keys of the profile that this scheme cannot have."""
        return [] if scheme.group_size is None else [f"scheme.group_size: LLM_INT8 has one scale per row (got {scheme.group_size})"]

    def shape_problems(self, shape: tuple[int, ...]) -> list[str]:
        """Every matrix fits."""
        return []

    def encode(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is stored for the tensor `name`."""
        values, absmax = self._quantize(weight)
        layer = name.removesuffix(".weight")
        yield name, values
        yield f"{layer}.SCB", absmax
        yield f"{layer}.weight_format", torch.tensor(0, dtype=torch.uint8)

    def decode(self, weight: torch.Tensor) -> torch.Tensor:
        """INT8 value times absmax / 127; the rounding of the activations is the engine's own and is not in it."""
        made: torch.Tensor = bitsandbytes.functional.int8_vectorwise_dequant(*self._quantize(weight))
        return made.to(weight.dtype)

    def _quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Through float16, as transformers' own quantization of a bf16 checkpoint has it.
        rows = weight.detach().to(torch.bfloat16).to(torch.float16).contiguous()
        values, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(rows)
        return values, absmax

    def arguments(self) -> Mapping[str, Any]:
        """What transformers' `BitsAndBytesConfig` says of this scheme."""
        return {"load_in_8bit": True}


WeightScheme = Nf4Weights | LlmInt8Weights
SCHEMES: dict[str, type[WeightScheme]] = {"NF4": Nf4Weights, "LLM_INT8": LlmInt8Weights}
