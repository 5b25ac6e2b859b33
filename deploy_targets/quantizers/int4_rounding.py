"""How INT4 weights are found, whatever file they go into: to the nearest, by GPTQ or by AWQ, and what is kept of a calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deploy_targets.errors import WeightsError
from deploy_targets.quantizers.awq import Fold, folds, search_scales
from deploy_targets.quantizers.gptq import gptq, inverse_factor
from deploy_targets.quantizers.int4_grid import GridRule, Int4Matrix, find_grid, nearest, round_to_nearest

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec

TILE = 32
"""vLLM's CPU kernel takes input and output sizes in multiples of this (CPUWNA16LinearKernel.can_implement)."""


class Int4Rounding:
    """Rounds the weights of one model, by `scheme.algorithm`. Until it is calibrated, every algorithm rounds to nearest."""

    def __init__(self, scheme: SchemeSpec, *, half_scales: bool = False) -> None:
        """`half_scales`: see `GridRule`."""
        self.rule = GridRule(scheme.group_size, scheme.symmetric, scheme.clip, half_scales)
        self.algorithm = scheme.algorithm
        self._act_order = scheme.act_order
        self._factors: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._rounded: dict[str, tuple[bytes, Int4Matrix]] = {}
        self._multiplied: dict[str, Tensor] = {}
        self._divided: dict[str, Tensor] = {}
        self._grams: dict[str, Tensor] = {}

    @staticmethod
    def problems(scheme: SchemeSpec) -> list[str]:
        """Keys of the profile that do not go together."""
        wrong = []
        if scheme.group_size is not None and scheme.group_size % 2:
            wrong.append(f"scheme.group_size: vLLM's CPU kernel wants an even group (got {scheme.group_size})")
        if scheme.act_order and scheme.algorithm != "gptq":
            wrong.append(f"scheme.act_order: only gptq has an order (the algorithm is {scheme.algorithm!r})")
        return wrong

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` changes anything."""
        return self.algorithm != "rtn"

    def calibrate(self, tensors: Iterable[tuple[str, Tensor]], grams: Mapping[str, Tensor]) -> None:
        """Round by `grams` from now on: weight name -> mean of x x^T over the layer's inputs, float32 [in, in].

        Weights whose name is not in it are rounded to nearest. `tensors` are the weights of now, all of the model.
        Raises `WeightsError` for a Gram matrix that is not finite.
        """
        for name, gram in grams.items():
            if not torch.isfinite(gram).all():
                raise WeightsError(
                    f"the inputs of {name!r} are not finite; nothing is published. The learner has diverged: lower learner.lr"
                )
        if self.algorithm == "gptq":
            self._factorize(grams)
        elif self.algorithm == "awq":
            self._search(tensors, grams)

    def _factorize(self, grams: Mapping[str, Tensor]) -> None:
        self._factors, self._rounded = {}, {}
        made: dict[int, tuple[Tensor, Tensor | None]] = {}
        for name, gram in grams.items():
            if id(gram) not in made:  # layers that share their input share its matrix
                order = torch.argsort(gram.diagonal(), descending=True, stable=True) if self._act_order else None
                made[id(gram)] = (inverse_factor(gram, order), order)
            self._factors[name] = made[id(gram)]

    def _search(self, tensors: Iterable[tuple[str, Tensor]], grams: Mapping[str, Tensor]) -> None:
        self._multiplied, self._divided, self._grams = {}, {}, dict(grams) if self.rule.clip == "mse" else {}
        waiting = {name: fold for fold in folds(tuple(grams)) for name in fold.consumers}
        seen: dict[str, Tensor] = {}
        num_outputs: dict[str, int] = {}
        found: dict[Fold, Tensor] = {}
        for name, tensor in tensors:
            num_outputs[name] = len(tensor)
            fold = waiting.get(name)
            if fold is None:
                continue
            seen[name] = tensor.detach().to(torch.bfloat16).float()
            if all(consumer in seen for consumer in fold.consumers):
                found[fold] = search_scales([seen.pop(consumer) for consumer in fold.consumers], grams[name], self._absmax)
        for fold, scales in found.items():
            if num_outputs[f"{fold.source}.weight"] != len(scales):
                continue  # heads that are shared hand one output to several inputs
            self._multiplied.update(dict.fromkeys(fold.consumers, scales))
            self._divided.update({f"{fold.source}.{part}": scales for part in ("weight", "bias")})
            if self._grams:
                scaled = grams[fold.consumers[0]] / scales / scales.unsqueeze(-1)
                self._grams.update(dict.fromkeys(fold.consumers, scaled))

    def _absmax(self, weight: Tensor) -> Tensor:
        """What the grid makes of `weight`, without a search for where it ends."""
        return nearest(weight, find_grid(weight, replace(self.rule, clip="absmax"))).dequantized().float()

    def folded(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` as the engine holds it before it is rounded: bf16, same shape. Powers of two move in without a rounding."""
        tensor = tensor.detach().to(torch.bfloat16)
        if name in self._divided:
            tensor = tensor / self._divided[name].to(torch.bfloat16).view(-1, *[1] * (tensor.dim() - 1))
        if name in self._multiplied:
            tensor = tensor * self._multiplied[name].to(torch.bfloat16)
        return tensor

    def rounded(self, name: str, weight: Tensor) -> Int4Matrix:
        """The values and the grid of `weight` [out, in], which is folded here."""
        folded = self.folded(name, weight)
        if name not in self._factors:
            return round_to_nearest(folded, self.rule, self._grams.get(name))
        # A publish asks twice, for the file and for the twin, and rounding by GPTQ takes seconds.
        digest = hashlib.sha256(folded.contiguous().view(torch.uint8).cpu().numpy().data).digest()
        known, matrix = self._rounded.get(name, (b"", None))
        if matrix is None or known != digest:
            factor, order = self._factors[name]
            matrix = gptq(folded.float(), factor, self.rule, order)
            self._rounded[name] = (digest, matrix)
        return matrix

    def dequantized(self, name: str, weight: Tensor) -> Tensor:
        """What the engine multiplies with in place of `weight`, where nothing is folded: same shape and dtype as `weight`."""
        served = self.rounded(name, weight).dequantized()
        if name in self._multiplied:
            served = served / self._multiplied[name].to(torch.bfloat16)
        if name in self._divided:
            served = served * self._divided[name].to(torch.bfloat16).unsqueeze(-1)
        return served.to(weight.dtype)
