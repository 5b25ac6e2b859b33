"""Grids of 16 values: the nearest ones, the search for where a grid ends, and scales that two formats hold."""

from __future__ import annotations

import pytest
import torch

from deploy_targets.quantizers.int4_grid import GridRule, find_grid, nearest


def random_weight(rows: int = 16, columns: int = 128, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) + 0.3 * torch.randn(rows, 1, generator=generator)).bfloat16().float()


def square_error(weight: torch.Tensor, rule: GridRule, gram: torch.Tensor | None = None) -> torch.Tensor:
    grid = find_grid(weight, rule, gram)
    served = (nearest(weight, grid).values.view(*grid.scales.shape, -1) - grid.zeros[..., None]) * grid.scales[..., None]
    return (served.view(weight.shape) - weight).square().view(*grid.scales.shape, -1).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_values_are_the_nearest_of_the_grid(symmetric: bool, group_size: int | None) -> None:
    weight, rule = random_weight(), GridRule(group_size, symmetric)
    grid = find_grid(weight, rule)
    matrix = nearest(weight, grid)
    levels = (torch.arange(16.0) - grid.zeros[..., None]) * grid.scales[..., None]
    groups = rule.groups(weight)
    distance = (groups[..., None] - levels[:, :, None]).abs()
    chosen = distance.gather(-1, rule.groups(matrix.values).long()[..., None])[..., 0]
    assert torch.allclose(chosen, distance.amin(-1), atol=1e-6)
    assert torch.equal(matrix.dequantized(), levels.gather(-1, rule.groups(matrix.values).long()).view(weight.shape).bfloat16())


def test_zero_is_on_every_grid_and_an_asymmetric_one_covers_its_group() -> None:
    weight = random_weight()
    weight[3] = weight[3].abs() + 1
    grid = find_grid(weight, GridRule(32, symmetric=False))
    assert torch.equal(grid.zeros, grid.zeros.round())
    assert (grid.zeros >= 0).all()
    assert (grid.zeros <= 15).all()
    assert not grid.zeros[3].any()
    groups = weight.view(16, 4, 32)
    step = grid.scales
    assert (groups.amax(-1) <= (15.5 - grid.zeros) * step * 1.01).all()
    assert (groups.amin(-1) >= (-0.5 - grid.zeros) * step * 1.01).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_never_costs_and_mostly_gains(symmetric: bool) -> None:
    weight = random_weight()
    ends, found = (square_error(weight, GridRule(32, symmetric, clip)) for clip in ("absmax", "mse"))
    assert (found <= ends + 1e-7).all()
    assert found.sum() < 0.95 * ends.sum()


def test_a_gram_matrix_makes_the_search_mind_the_inputs() -> None:
    """All inputs but one are silent: that one's weight decides where the grid ends."""
    weight = random_weight(8, 32)
    gram = torch.zeros(32, 32)
    gram[5, 5] = 1
    rule = GridRule(32, clip="mse")
    blind, minding = (nearest(weight, find_grid(weight, rule, matrix)).dequantized().float() for matrix in (None, gram))
    assert (minding - weight)[:, 5].square().sum() < (blind - weight)[:, 5].square().sum()
    assert torch.equal(find_grid(weight, rule, torch.eye(32)).scales, find_grid(weight, rule).scales)


@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_scales_are_held_by_fp16_and_by_bf16(symmetric: bool, clip: str) -> None:
    weight = random_weight(24, 64) * torch.logspace(-8, 3, 24).view(-1, 1)
    scales = find_grid(weight, GridRule(32, symmetric, clip, half_scales=True)).scales  # type: ignore[arg-type]
    assert torch.equal(scales, scales.half().float())
    assert torch.equal(scales, scales.bfloat16().float())
    assert (scales > 0).all()
    assert not torch.equal(scales, find_grid(weight, GridRule(32, symmetric)).scales), "nothing was too small for fp16"


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_and_nan_is_not_hidden(symmetric: bool) -> None:
    weight = random_weight()
    weight[1, :32] = 0
    weight[2, 40] = float("nan")
    weight[4, 70] = float("inf")
    for clip in ("absmax", "mse"):
        matrix = nearest(weight, find_grid(weight, GridRule(32, symmetric, clip)))  # type: ignore[arg-type]
        assert matrix.grid.scales[1, 0] == 1
        assert not matrix.dequantized()[1, :32].any()
        assert matrix.grid.scales[2, 1].isnan()
        assert not matrix.grid.scales[4, 2].isfinite()
