"""Roundings that the gradient does not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(values: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Forward: `rounding(values)`. Backward: the gradient passes to `values` unchanged (Bengio et al., arXiv 1308.3432).

    The usual values + (rounded - values).detach() would be rounded once more in bf16 and miss the target's grid.
    """
    with torch.no_grad():
        rounded = rounding(values)
    return _StraightThrough.apply(values, rounded)  # type: ignore[no-any-return, no-untyped-call]
