"""Straight-through fake quantization: one set of weights, run as they are or as the target will round them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deploy_targets.protocols import Quantizer


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounded weight. Backward: the gradient passes to the weight unchanged (Bengio et al., arXiv 1308.3432).

    The usual w + (round(w) - w).detach() would be rounded once more in bf16 and miss the target's grid.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class TwinLinear(nn.Linear):
    """A linear layer that computes with its weight, or, inside `twin(...)`, with its fake-quantized twin."""

    weight_name: str
    quantizer: Quantizer
    as_twin: bool
    _rounded: Tensor | None

    @classmethod
    def around(cls, linear: nn.Linear, weight_name: str, quantizer: Quantizer) -> TwinLinear:
        """Share the parameters of `linear`, which this layer replaces under the same names."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_name, layer.quantizer, layer.as_twin, layer._rounded = weight_name, quantizer, False, None
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """X @ W.T + b, with W rounded to the target's grid when `as_twin`."""
        if not self.as_twin:
            return super().forward(input)
        return nn.functional.linear(input, self.rounded_weight(), self.bias)

    def rounded_weight(self) -> Tensor:
        """The weight as the target computes with it; kept until `forget`, because micro-batches share it."""
        if self._rounded is None:
            with torch.no_grad():
                self._rounded = self.quantizer.dequantized(self.weight_name, self.weight)
        return _StraightThrough.apply(self.weight, self._rounded)  # type: ignore[no-any-return, no-untyped-call]

    def forget(self) -> None:
        """Drop the rounded weight; due after every change of the weights."""
        self._rounded = None


def add_twin(model: nn.Module, quantizer: Quantizer) -> list[TwinLinear]:
    """Replace every linear layer that `quantizer` quantizes by a `TwinLinear` over the same parameters, in place."""
    layers = []
    for module_name, module in list(model.named_modules()):
        weight_name = f"{module_name}.weight"
        if type(module) is nn.Linear and quantizer.quantizes(weight_name):
            layer = TwinLinear.around(module, weight_name, quantizer)
            model.set_submodule(module_name, layer)
            layers.append(layer)
    return layers


@contextmanager
def twin(layers: list[TwinLinear]) -> Iterator[None]:
    """Within the block, `layers` compute with their fake-quantized weights."""
    for layer in layers:
        layer.as_twin = True
    try:
        yield
    finally:
        for layer in layers:
            layer.as_twin = False
