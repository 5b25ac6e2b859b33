"""Straight-through fake quantization: one set of weights, run as they are or as the target will round them."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deploy_targets.protocols import ActivationQuantizer, Quantizer
from deploy_targets.saved_names import saved_views
from hetero_rl.learner.compute import FollowingLinear
from hetero_rl.learner.straight_through import straight_through


class _Twin(nn.Module):
    """What both kinds of twin share: the name of the weight, its quantizer, and whether to compute with the rounded one."""

    weight: Tensor
    weight_name: str
    quantizer: Quantizer
    inputs_rounded_by: ActivationQuantizer | None
    as_twin: bool
    keep: bool
    noise_seed: int | None
    _rounded: Tensor | None

    def adopt(self, weight_name: str, quantizer: Quantizer, keep: bool) -> None:
        """Become the twin of the weight that a checkpoint calls `weight_name`."""
        self.inputs_rounded_by = quantizer if isinstance(quantizer, ActivationQuantizer) and quantizer.rounds_inputs else None
        self.weight_name, self.quantizer, self.keep = weight_name, quantizer, keep
        self.as_twin, self.noise_seed, self._rounded = False, None, None

    def active_weight(self) -> Tensor:
        """The weight, or inside `twin(...)` the values the target computes with, which `keep` holds until `forget`."""
        if not self.as_twin:
            return self.weight
        return straight_through(self.weight, self._round)

    def _round(self, weight: Tensor) -> Tensor:
        rounded = self._rounded
        if rounded is None:
            rounded = self.quantizer.dequantized(self.weight_name, weight)
            rounded = with_random_signs(self.weight_name, weight, rounded, self.noise_seed)
        self._rounded = rounded if self.keep else None
        return rounded

    def forget(self) -> None:
        """Drop the rounded weight; due after every change of the weights."""
        self._rounded = None


class TwinLinear(_Twin, FollowingLinear):
    """A linear layer that computes with its weight, or with its fake-quantized twin, whose inputs are rounded where the kernels do so."""

    def forward(self, input: Tensor) -> Tensor:
        """X @ W.T + b."""
        if self.as_twin and self.inputs_rounded_by is not None:
            input = straight_through(input, partial(self.inputs_rounded_by.rounded_inputs, self.weight_name))
        return super().forward(input)


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


class TwinExperts(nn.Module):
    """Experts of one layer, fused as transformers runs them: they compute with their weights, or with the rounded ones of each expert.

    The module that computes stays as it is and is called with these weights in place of its own (`torch.func.functional_call`).
    """

    def __init__(self, experts: nn.Module, weight_names: dict[str, str], quantizer: Quantizer, stored: Container[str], keep: bool) -> None:
        """Share the parameters of `experts`, which this module replaces under the same names.

        `weight_names`: name within the module -> name within the model. `stored`, `keep`: as `add_twin` has them.
        """
        super().__init__()
        # In a tuple, so that its parameters are not registered a second time.
        self._experts = (experts,)
        self.weight_names, self.quantizer, self.stored, self.keep = weight_names, quantizer, stored, keep
        self.as_twin = False
        self.noise_seed: int | None = None
        self._rounded: dict[str, Tensor] = {}
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the experts make of their arguments."""
        return functional_call(self._experts[0], {name: self._active(name) for name in self.weight_names}, args, kwargs)

    def _active(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        if not self.as_twin:
            return weight
        return straight_through(weight, partial(self._round, name))

    def _round(self, name: str, weight: Tensor) -> Tensor:
        rounded = self._rounded.get(name)
        if rounded is None:
            rounded = weight.detach().clone()
            for saved_name, view in saved_views(self.weight_names[name], rounded, self.stored):
                view.copy_(with_random_signs(saved_name, view, self.quantizer.dequantized(saved_name, view), self.noise_seed))
        if self.keep:
            self._rounded[name] = rounded
        return rounded

    def forget(self) -> None:
        """Drop the rounded weights; due after every change of the weights."""
        self._rounded = {}


TwinLayer = TwinLinear | TwinEmbedding | TwinExperts


def add_twin(model: nn.Module, quantizer: Quantizer, stored: Container[str] = (), *, keep: bool = True) -> list[TwinLayer]:
    """Replace every linear layer, embedding and layer of experts that `quantizer` quantizes by a twin over the same parameters, in place.

    A tied output layer is quantized when its embedding is: a checkpoint holds the one weight under the embedding's name.
    `stored`: the names of the checkpoint's tensors, which tell whether experts are stored one by one. `keep`: hold the rounded
    weights until they are forgotten, a copy of the model that micro-batches share; else each forward pass rounds layer by layer.
    """
    layers: list[TwinLayer] = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module_name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, nn.Embedding):
            fused = {
                name: names[parameter]
                for name, parameter in module.named_parameters(recurse=False)
                if any(
                    saved != names[parameter] and quantizer.quantizes(saved)
                    for saved, _ in saved_views(names[parameter], parameter, stored)
                )
            }
            if fused:
                experts = TwinExperts(module, fused, quantizer, stored, keep)
                model.set_submodule(module_name, experts)
                layers.append(experts)
            continue
        weight_name = names[module.weight]
        if not quantizer.quantizes(weight_name):
            continue
        layer = TwinLinear.around(module) if isinstance(module, nn.Linear) else TwinEmbedding.around(module)
        layer.adopt(weight_name, quantizer, keep)
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


@contextmanager
def random_errors(layers: list[TwinLayer], seed: int) -> Iterator[None]:
    """Within the block, the twin's rounding errors have random signs, drawn from `seed`: noise of the target's own size."""
    for layer in layers:
        layer.forget()
        layer.noise_seed = seed
    try:
        yield
    finally:
        for layer in layers:
            layer.forget()
            layer.noise_seed = None


def with_random_signs(name: str, weight: Tensor, rounded: Tensor, seed: int | None) -> Tensor:
    """`rounded` without a seed, else weight + s (rounded - weight), s = -1 or 1 for each element; shape and dtype of `weight`.

    `name` is the weight's: each has signs of its own.
    """
    if seed is None:
        return rounded
    generator = torch.Generator(weight.device).manual_seed(crc32(f"{seed}/{name}".encode()))
    signs = torch.randint(0, 2, weight.shape, generator=generator, device=weight.device, dtype=torch.int8).to(weight.dtype)
    return weight + (2 * signs - 1) * (rounded - weight)
