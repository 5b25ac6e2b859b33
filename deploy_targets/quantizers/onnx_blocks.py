"""The arithmetic of ONNX Runtime's MatMulNBits, bit for bit what onnxruntime-genai's model builder writes.

The builder needs seconds to minutes for a model; these are the same numbers as plain functions on tensors, fast enough
to run after every optimizer step. The grid is that of MLAS' blockwise quantizer
(https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/mlas/lib/q4_dq.cpp): a block of `group_size`
inputs shares one signed scale, the extreme value of the block divided by -8 (4 bits) or -128 (8 bits), so that the extreme
always lands on code 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy_targets.quantizers.rows import rows_in_caches

if TYPE_CHECKING:
    import torch

GROUP_SIZES = (16, 32, 64, 128, 256)
BITS = (4, 8)


def quantize_blocks(weight: torch.Tensor, group_size: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of a weight [N, K], float32 or float16, on the MatMulNBits grid.

    Returns codes uint8 [N, K / group_size, group_size] in 0..2^bits - 1 and scales [N, K / group_size] in the dtype of
    `weight`, with weight ~ (code - offset) * scale and offset = 2^(bits - 1). The code is
    round_half_away(w / scale + offset) by the scale as it is stored, the offset added before rounding, as MLAS does: on a
    tie the order decides.
    """
    import torch

    codes = torch.empty(weight.shape[0], weight.shape[1] // group_size, group_size, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(codes.shape[:-1], dtype=weight.dtype, device=weight.device)
    for rows in rows_in_caches(weight):
        codes[rows], scales[rows] = _quantize_rows(weight[rows].float().view(codes[rows].shape), weight.dtype, bits)
    return codes, scales


def _quantize_rows(blocks: torch.Tensor, scale_dtype: torch.dtype, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    offset = 1 << bits - 1
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)  # torch.aminmax is several times slower over so short a dimension
    scales = (torch.where(high.abs() > low.abs(), high, low) / -offset).to(scale_dtype)
    reciprocal = torch.where(scales == 0, 0.0, scales.float().reciprocal())
    shifted = (blocks * reciprocal.unsqueeze(-1)).add_(offset)
    return shifted.add_(0.5).clamp_(0, 2 * offset - 1).to(torch.uint8), scales


def pack_blocks(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., group_size] -> uint8 [..., group_size * bits / 8]: two codes of 4 bits to a byte, the earlier in the low half."""
    import torch

    if bits == 8:
        return codes
    pairs = codes.view(torch.int16)  # little-endian: the later code is the high byte
    return (pairs | pairs >> 4).to(torch.uint8)


def dequantize_blocks(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] that MatMulNBits computes with: (code - offset) * scale in float32, rounded to `dtype`."""
    import torch

    weight = torch.empty(codes.shape[0], codes.shape[1] * codes.shape[2], dtype=dtype, device=codes.device)
    for rows in rows_in_caches(weight):
        weight[rows] = codes[rows].float().sub_(1 << bits - 1).mul_(scales[rows].float().unsqueeze(-1)).flatten(1)
    return weight
