"""GPTQ: values that make up for each other's rounding errors on the inputs that the layer really sees (arXiv 2210.17323, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from deploy_targets.quantizers.int4_grid import Grid, GridRule, Int4Matrix, find_grid

BLOCK = 128
"""Columns whose updates reach the columns behind them in one product of matrices."""
DAMPING = 0.01
"""What is added to the diagonal of the Gram matrix, in shares of its mean (`percdamp` in the authors' code)."""


def inverse_factor(gram: Tensor, order: Tensor | None = None) -> Tensor:
    """The upper triangular U with U^T U = (G + damping)^-1, float32 [in, in], for the mean Gram matrix `gram` [in, in] of the inputs.

    `order`: int64 [in], the order in which columns are quantized; U is in that order. Computed in float64. Of a matrix of
    zeros (inputs never seen) it is the identity, with which `gptq` rounds to nearest.
    """
    matrix = gram.double()
    if order is not None:
        matrix = matrix[order][:, order]
    mean = matrix.diagonal().mean()
    identity = torch.eye(len(matrix), dtype=torch.float64, device=gram.device)
    if mean == 0:
        return identity.float()
    matrix = matrix + DAMPING * mean * identity
    # With the rows and columns reversed, G = R R^T for an upper triangular R, and U = R^-1: no inverse is factorized.
    reversed_factor = torch.linalg.cholesky(matrix.flip(0, 1))
    inverse: Tensor = torch.linalg.solve_triangular(reversed_factor, identity, upper=False)
    return inverse.flip(0, 1).float()


def gptq(weight: Tensor, factor: Tensor, rule: GridRule, order: Tensor | None = None) -> Int4Matrix:
    """Values of `weight` float32 [out, in] on the grid of `rule`, one input channel after the other.

    `factor` is that of `inverse_factor`, in the same `order`. Without an order, the grid of a group is found when the group's
    turn comes, for the weights as the errors of those before have moved them; with one, groups are mixed, and all grids are
    found beforehand.
    """
    columns = weight.t().contiguous()
    num_inputs = len(columns)
    group_size = rule.group_size or num_inputs
    grid = find_grid(weight, rule)
    scales, zeros = grid.scales.t().contiguous(), grid.zeros.t().contiguous()
    places = range(num_inputs) if order is None else order.tolist()
    if order is not None:
        columns = columns[order]
    chosen = torch.empty_like(columns, dtype=torch.uint8)
    diagonal = factor.diagonal().tolist()
    for start in range(0, num_inputs, BLOCK):
        end = min(start + BLOCK, num_inputs)
        block, errors = columns[start:end], torch.empty_like(columns[start:end])
        for i in range(end - start):
            place = start + i
            group = places[place] // group_size
            if order is None and place % group_size == 0 and place > 0:
                _find_again(columns, factor, errors, start, place, group_size, rule, scales[group], zeros[group])
            column, scale, zero = block[i], scales[group], zeros[group]
            values = (column / scale).round_().add_(zero).clamp_(0, 15)
            chosen[place] = values
            error = torch.sub(column, values.sub_(zero).mul_(scale), out=errors[i]).div_(diagonal[place])
            block[i + 1 :].addr_(factor[place, place + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    values = torch.empty_like(chosen)
    values[torch.as_tensor(places, device=values.device)] = chosen
    return Int4Matrix(values.t().contiguous(), Grid(scales.t().contiguous(), zeros.t().contiguous()))


def _find_again(
    columns: Tensor, factor: Tensor, errors: Tensor, start: int, place: int, group_size: int, rule: GridRule, scale: Tensor, zero: Tensor
) -> None:
    """Put the grid of the group that begins at `place` into `scale` and `zero`, for its columns as they are now.

    Columns behind the block of `start` have not yet got the errors of the block; a copy of them gets them here.
    """
    end, group_end = min(start + BLOCK, len(columns)), place + group_size
    now = columns[place : min(end, group_end)]
    if group_end > end:
        behind = columns[end:group_end] - factor[start:place, end:group_end].t() @ errors[: place - start]
        now = torch.cat([now, behind])
    grid = find_grid(now.t().contiguous(), GridRule(None, rule.symmetric, rule.clip, rule.half_scales))
    scale.copy_(grid.scales[:, 0])
    zero.copy_(grid.zeros[:, 0])
