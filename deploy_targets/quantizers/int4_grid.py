"""Grids of 16 values: which values the INT4 weights of a layer may take, the nearest of them, and eight to a word.

A stored value q in [0, 15] of a weight stands for (q - zero) * scale; scale and zero belong to a group of input channels of one
output channel. A symmetric grid has zero 8 everywhere. The checkpoint formats differ in how they lay these numbers out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deploy_targets.quantizers.rows import rows_in_caches

SYMMETRIC_ZERO = 8
_TOP = 15
_WHOLE = 1.5 * 2.0**23
"""A float32 near this number is whole, so that adding this rounds a small number to the nearest whole one (ties to even); the whole
number then stands in the lowest bits of the sum."""
_SHRINK = tuple(1.08 - 0.04 * step for step in range(16))
"""Factors of the largest absolute value (or of the range) that the search for the least square error tries, 1.08 to 0.48.

More than 1 can be the better one: the symmetric grid reaches 8 steps down and 7 up, and absmax / 7.5 lies between.
"""


@dataclass(frozen=True, slots=True)
class GridRule:
    """How a grid is found. `half_scales`: scales that fp16 holds as exactly as bf16 does, for formats that store fp16."""

    group_size: int | None
    symmetric: bool = True
    clip: Literal["absmax", "mse"] = "absmax"
    half_scales: bool = False

    def groups(self, weight: Tensor) -> Tensor:
        """View [out, in] as [out, num_groups, group_size]; `group_size` None is one group."""
        return weight.view(weight.shape[0], -1, self.group_size or weight.shape[1])


@dataclass(frozen=True, slots=True)
class Grid:
    """`scales`: float32 [out, num_groups], each a number that bf16 holds; `zeros`: float32 [out, num_groups], whole, 0 to 15."""

    scales: Tensor
    zeros: Tensor


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """`values`: uint8 [out, in] in [0, 15], and the grid that they lie on."""

    values: Tensor
    grid: Grid

    def dequantized(self) -> Tensor:
        """(value - zero) * scale, rounded to bf16: bf16 [out, in], the matrix that the kernels multiply with."""
        served = torch.empty(self.values.shape, dtype=torch.bfloat16, device=self.values.device)
        for rows in rows_in_caches(served):
            scales, zeros = self.grid.scales[rows].unsqueeze(-1), self.grid.zeros[rows].unsqueeze(-1)
            groups = self.values[rows].view(*scales.shape[:-1], -1).float()
            served[rows] = groups.sub_(zeros).mul_(scales).flatten(1)
        return served


def find_grid(weight: Tensor, rule: GridRule, gram: Tensor | None = None) -> Grid:
    """The grid of each group of `weight` float32 [out, in].

    absmax: the scale is the largest absolute value / 7.5, as llm-compressor has it (half the 15 steps of the grid); without
    symmetry it is the range, 0 included, / 15. mse: those times the factor whose nearest values have the least square error, of
    the weights, or, given the mean Gram matrix `gram` float32 [in, in] of the layer's inputs, of what the group adds to the output.
    Scales are rounded before values are found, so that these are the nearest ones on the grid that is served. A group of zeros has
    scale 1; NaN and infinity stay what they are: that is how such weights are found out before they are published.
    """
    groups = rule.groups(weight)
    low, high = _bounds(groups, rule.symmetric)
    if rule.clip == "absmax":
        return _grid(low, high, 1.0, rule)
    blocks = None if gram is None else _diagonal_blocks(gram, groups.shape[-1])
    best = _grid(low, high, 1.0, rule)
    least = _square_error(groups, best, blocks)
    for factor in _SHRINK:
        grid = _grid(low, high, factor, rule)
        error = _square_error(groups, grid, blocks)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros))
    return best


def nearest(weight: Tensor, grid: Grid) -> Int4Matrix:
    """The nearest values of `grid` to `weight` float32 [out, in]."""
    groups = weight.view(*grid.scales.shape, -1)
    # The lowest byte of each sum is its value: narrowing words is faster than converting floats.
    return Int4Matrix(_values_above_whole(groups, grid).view(torch.int32).to(torch.uint8).view(weight.shape), grid)


def round_to_nearest(weight: Tensor, rule: GridRule, gram: Tensor | None = None) -> Int4Matrix:
    """The nearest values to `weight` [out, in] on the grid that `find_grid` finds for it, some rows at a time."""
    parts = []
    for rows in rows_in_caches(weight):
        some = weight[rows].float()
        parts.append(nearest(some, find_grid(some, rule, gram)))
    if len(parts) == 1:
        return parts[0]
    grid = Grid(torch.cat([part.grid.scales for part in parts]), torch.cat([part.grid.zeros for part in parts]))
    return Int4Matrix(torch.cat([part.values for part in parts]), grid)


def pack_nibbles(values: Tensor) -> Tensor:
    """Pack uint8 [rows, columns] in [0, 15] into int32 [rows, columns / 8], lowest bits first.

    Two bytes are read as a (little-endian) word of 16 bits, whose halves are joined, and four of the joined bytes as the result:
    no temporaries of 32 bits for each value.
    """
    pairs = values.reshape(-1).view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8).view(torch.int32).view(len(values), -1)


def _bounds(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that the grid of each group has to hold; `torch.aminmax` is slow for short rows."""
    if symmetric:
        high = groups.abs().amax(dim=-1)
        return -high, high
    return groups.amin(dim=-1), groups.amax(dim=-1)


def _grid(low: Tensor, high: Tensor, factor: float, rule: GridRule) -> Grid:
    if rule.symmetric:
        scales = _storable(high / (7.5 / factor), rule.half_scales)
        return Grid(scales, torch.full_like(scales, SYMMETRIC_ZERO))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = _storable((high - low) / (_TOP / factor), rule.half_scales)
    # What is cut off, is cut off at both ends by the same number of steps.
    return Grid(scales, (_TOP / 2 - (low + high) / (2 * scales)).round_().clamp_(0, _TOP))


def _values_above_whole(groups: Tensor, grid: Grid) -> Tensor:
    """The value of each weight, plus `_WHOLE`."""
    return (groups / grid.scales.unsqueeze(-1)).add_((grid.zeros + _WHOLE).unsqueeze(-1)).clamp_(_WHOLE, _WHOLE + _TOP)


def _square_error(groups: Tensor, grid: Grid, blocks: Tensor | None) -> Tensor:
    error = _values_above_whole(groups, grid).sub_((grid.zeros + _WHOLE).unsqueeze(-1)).mul_(grid.scales.unsqueeze(-1)).sub_(groups)
    return error.square_().sum(dim=-1) if blocks is None else (torch.einsum("ogi,gij->ogj", error, blocks) * error).sum(dim=-1)


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """[num_groups, size, size]: the Gram matrix of each group's own inputs."""
    return torch.stack([gram[start : start + size, start : start + size] for start in range(0, len(gram), size)])


def _storable(scales: Tensor, half: bool) -> Tensor:
    """Nearest scales that bf16, and fp16 where asked, hold; 1 in place of 0.

    A number of fp16 rounded to the 8 digits of bf16 stays one: below 2^-14, fp16 holds every multiple of 2^-24.
    """
    scales = (scales.half() if half else scales).to(torch.bfloat16).float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)
