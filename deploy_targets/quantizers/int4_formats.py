"""INT4 weights as files hold them: what a layer's values, scales and zeros become in each checkpoint format.

pack-quantized: https://github.com/vllm-project/compressed-tensors. gptq: https://github.com/AutoGPTQ/AutoGPTQ, version 1, whose
zeros are stored one too small. awq: https://github.com/casper-hansen/AutoAWQ, version gemm.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deploy_targets.quantizers.int4_grid import Int4Matrix, pack_nibbles

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours lies in bits 0-3, 4-7, ... of a word."""

Stored = Iterator[tuple[str, Tensor]]


def pack_quantized(matrix: Int4Matrix, *, symmetric: bool) -> Stored:
    """`weight_packed` int32 [out, in / 8], lowest bits first; `weight_scale` bf16 [out, groups]; `weight_shape` int64 [2].

    Without symmetry also `weight_zero_point` int32 [out / 8, groups], packed along the output channels.
    """
    yield "weight_packed", pack_nibbles(matrix.values)
    yield "weight_scale", matrix.grid.scales.to(torch.bfloat16)
    if not symmetric:
        yield "weight_zero_point", pack_nibbles(_zeros(matrix).t()).t().contiguous()
    yield "weight_shape", torch.tensor(matrix.values.shape, dtype=torch.int64)


def gptq_v1(matrix: Int4Matrix) -> Stored:
    """`qweight` int32 [in / 8, out]; `qzeros` int32 [groups, out / 8], zeros - 1; `scales` fp16 [groups, out]; `g_idx` int32 [in]."""
    num_groups, num_inputs = matrix.grid.scales.shape[1], matrix.values.shape[1]
    yield "qweight", pack_nibbles(matrix.values).t().contiguous()
    yield "qzeros", pack_nibbles((_zeros(matrix) - 1).t())
    yield "scales", matrix.grid.scales.t().contiguous().half()
    yield "g_idx", torch.arange(num_inputs, dtype=torch.int32) // (num_inputs // num_groups)


def awq_gemm(matrix: Int4Matrix) -> Stored:
    """`qweight` int32 [in, out / 8] in `AWQ_ORDER`; `qzeros` int32 [groups, out / 8] likewise; `scales` fp16 [groups, out]."""
    yield "qweight", pack_nibbles(_awq_ordered(matrix.values.t()))
    yield "qzeros", pack_nibbles(_awq_ordered(_zeros(matrix).t()))
    yield "scales", matrix.grid.scales.t().contiguous().half()


def _zeros(matrix: Int4Matrix) -> Tensor:
    return matrix.grid.zeros.to(torch.uint8)


def _awq_ordered(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1, 8)[..., list(AWQ_ORDER)].flatten(1)
