"""W4A16 in the format of compressed-tensors (pack-quantized)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs

from deploy_targets.quantizers.int4_formats import pack_quantized
from deploy_targets.quantizers.int4_rounding import TILE, Int4Rounding

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec


class Int4Weights:
    """W4A16: INT4 with one bf16 scale, and without symmetry one zero, per group of input channels; activations as they are."""

    bits = 4
    tile = TILE
    format: ClassVar = CompressionFormat.pack_quantized

    def __init__(self, scheme: SchemeSpec) -> None:
        """`group_size` None is one scale per output channel."""
        self.rounding = Int4Rounding(scheme)
        self.group_size = scheme.group_size
        self._symmetric = scheme.symmetric

    @staticmethod
    def problems(scheme: SchemeSpec) -> list[str]:
        """Keys of the profile that this scheme cannot have."""
        return Int4Rounding.problems(scheme)

    def encode(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is stored for the weight `name`: see `pack_quantized`."""
        module = name.removesuffix("weight")
        matrix = self.rounding.rounded(name, weight)
        return ((f"{module}{part}", tensor) for part, tensor in pack_quantized(matrix, symmetric=self._symmetric))

    def decode(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """INT4 value less zero, times bf16 scale, rounded to bf16: the matrix that the kernels multiply with."""
        return self.rounding.dequantized(name, weight)

    def arguments(self) -> tuple[QuantizationArgs, QuantizationArgs | None]:
        """What `config.json` says of weights and of activations."""
        strategy = "channel" if self.group_size is None else "group"
        return QuantizationArgs(num_bits=4, type="int", symmetric=self._symmetric, strategy=strategy, group_size=self.group_size), None
