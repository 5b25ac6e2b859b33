"""GPTQ against the definition it computes, against round-to-nearest, and in what it must not depend on."""

from __future__ import annotations

import pytest
import torch

from deploy_targets.quantizers import gptq as module
from deploy_targets.quantizers.awq import output_error
from deploy_targets.quantizers.gptq import DAMPING, gptq, inverse_factor
from deploy_targets.quantizers.int4_grid import GridRule, find_grid, nearest


def problem(rows: int = 24, columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the mean Gram matrix of inputs that are correlated and of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs *= torch.randn(columns, generator=generator).exp()
    return weight, inputs.T @ inputs / len(inputs)


def by_definition(weight: torch.Tensor, gram: torch.Tensor, rule: GridRule, order: list[int]) -> torch.Tensor:
    """Optimal brain quantization with static grids: a column is rounded, those left take the best update, and H^-1 loses the column."""
    columns = len(gram)
    damped = gram.double() + DAMPING * gram.diagonal().double().mean() * torch.eye(columns)
    grid = find_grid(weight, rule)
    size = rule.group_size or columns
    left, inverse, moved = list(order), torch.linalg.inv(damped[order][:, order]), weight.double().clone()
    values = torch.empty(weight.shape, dtype=torch.uint8)
    while left:
        column = left[0]
        scale, zero = grid.scales[:, column // size].double(), grid.zeros[:, column // size].double()
        chosen = ((moved[:, column] / scale).round() + zero).clamp(0, 15)
        values[:, column] = chosen
        error = (moved[:, column] - (chosen - zero) * scale) / inverse[0, 0]
        moved[:, left] -= error[:, None] * inverse[0][None]
        inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]
        left = left[1:]
    return values


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, gram = problem()
    damped = gram.double() + DAMPING * gram.diagonal().double().mean() * torch.eye(96)
    for order in (None, torch.randperm(96, generator=torch.Generator().manual_seed(0))):
        factor = inverse_factor(gram, order).double()
        wanted = torch.linalg.inv(damped if order is None else damped[order][:, order])
        assert torch.equal(factor, factor.triu())
        assert torch.allclose(factor.T @ factor, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_in_order_of_size_it_is_optimal_brain_quantization(symmetric: bool) -> None:
    weight, gram = problem()
    rule = GridRule(32, symmetric)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    found = gptq(weight, inverse_factor(gram, order), rule, order)
    wanted = by_definition(weight, gram, rule, order.tolist())
    # float32 against float64: a value at the middle between two may fall either way, and moves the few behind it.
    assert (found.values == wanted).float().mean() > 0.99
    assert torch.equal(found.grid.scales, find_grid(weight, rule).scales)


def test_one_group_in_its_own_order_is_optimal_brain_quantization() -> None:
    weight, gram = problem()
    found = gptq(weight, inverse_factor(gram), GridRule(None))
    assert (found.values == by_definition(weight, gram, GridRule(None), list(range(96)))).float().mean() > 0.99


@pytest.mark.parametrize("group_size", [32, 24, 96, None])
def test_the_block_size_changes_nothing(group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem()
    factor = inverse_factor(gram)
    once = gptq(weight, factor, GridRule(group_size))
    monkeypatch.setattr(module, "BLOCK", 20)
    again = gptq(weight, factor, GridRule(group_size))
    assert (once.values == again.values).float().mean() > 0.99
    assert torch.allclose(once.grid.scales, again.grid.scales, rtol=0.01)


@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_output_error_is_far_below_that_of_the_nearest_values(symmetric: bool, act_order: bool, clip: str) -> None:
    weight, gram = problem()
    rule = GridRule(32, symmetric, clip)  # type: ignore[arg-type]
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else None
    ours = output_error(gptq(weight, inverse_factor(gram, order), rule, order).dequantized() - weight, gram)
    rounded = output_error(nearest(weight, find_grid(weight, rule)).dequantized() - weight, gram)
    assert ours < (0.6 if act_order else 0.7) * rounded


@pytest.mark.parametrize("gram", [torch.eye(96), torch.zeros(96, 96)])
def test_with_nothing_known_of_the_inputs_it_rounds_to_nearest(gram: torch.Tensor) -> None:
    weight, _ = problem()
    for rule in (GridRule(32), GridRule(None, symmetric=False, clip="mse")):
        grid = find_grid(weight, rule)
        assert torch.equal(gptq(weight, inverse_factor(gram), rule).values, nearest(weight, grid).values)


def test_inputs_that_are_never_seen_are_rounded_to_nearest() -> None:
    weight, gram = problem()
    gram[:, 32:64] = gram[32:64] = 0
    found = gptq(weight, inverse_factor(gram), GridRule(32))
    wanted = nearest(weight[:, 32:64].contiguous(), find_grid(weight[:, 32:64].contiguous(), GridRule(32)))
    assert torch.equal(found.values[:, 32:64], wanted.values)
