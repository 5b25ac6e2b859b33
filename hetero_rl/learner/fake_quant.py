"""Straight-through fake quantization: one set of weights, run as they are or as the target will round them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deploy_targets.protocols import Quantizer
from hetero_rl.learner.compute import FollowingLinear


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


class _Twin(nn.Module):
    """What both kinds of twin share: the name of the weight, its quantizer, and whether to compute with the rounded one."""

    weight: Tensor
    weight_name: str
    quantizer: Quantizer
    as_twin: bool
    _rounded: Tensor | None

    def adopt(self, weight_name: str, quantizer: Quantizer) -> None:
        """Become the twin of the weight that a checkpoint calls `weight_name`."""
        self.weight_name, self.quantizer, self.as_twin, self._rounded = weight_name, quantizer, False, None

    def active_weight(self) -> Tensor:
        """The weight, or inside `twin(...)` the values the target computes with; kept until `forget`: micro-batches share them."""
        if not self.as_twin:
            return self.weight
        if self._rounded is None:
            with torch.no_grad():
                self._rounded = self.quantizer.dequantized(self.weight_name, self.weight)
        return _StraightThrough.apply(self.weight, self._rounded)  # type: ignore[no-any-return, no-untyped-call]

    def forget(self) -> None:
        """Drop the rounded weight; due after every change of the weights."""
        self._rounded = None


class TwinLinear(_Twin, FollowingLinear):
    """A linear layer that computes with its weight, or with its fake-quantized twin."""


class TwinEmbedding(_Twin, nn.Embedding):
    """An embedding that looks up its weight, or its fake-quantized twin (targets that store tied embeddings in few bits)."""

    @classmethod
    def around(cls, embedding: nn.Embedding) -> TwinEmbedding:
        """Share the parameter of `embedding`, which this layer replaces under the same name."""
        with torch.device("meta"):
            layer = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        layer.weight = embedding.weight
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Rows of W."""
        return nn.functional.embedding(input, self.active_weight(), self.padding_idx)


TwinLayer = TwinLinear | TwinEmbedding


def add_twin(model: nn.Module, quantizer: Quantizer) -> list[TwinLayer]:
    """Replace every linear layer and embedding that `quantizer` quantizes by a twin over the same parameters, in place.

    A tied output layer is quantized when its embedding is: a checkpoint holds the one weight under the embedding's name.
    """
    layers: list[TwinLayer] = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module_name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, nn.Embedding):
            continue
        weight_name = names[module.weight]
        if not quantizer.quantizes(weight_name):
            continue
        layer = TwinLinear.around(module) if isinstance(module, nn.Linear) else TwinEmbedding.around(module)
        layer.adopt(weight_name, quantizer)
        model.set_submodule(module_name, layer)
        layers.append(layer)
    return layers


@contextmanager
def twin(layers: list[TwinLayer]) -> Iterator[None]:
    """Within the block, `layers` compute with their fake-quantized weights."""
    for layer in layers:
        layer.as_twin = True
    try:
        yield
    finally:
        for layer in layers:
            layer.as_twin = False
