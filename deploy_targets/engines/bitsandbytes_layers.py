"""The layers of bitsandbytes within a model that transformers has loaded: how they compute, and how they take new weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from deploy_targets.errors import EngineError
from deploy_targets.quiet_bitsandbytes import bitsandbytes

_WEIGHT = "weight"
_SCALES = "SCB"


class QuantizedLayers:
    """The `Linear4bit` and `Linear8bitLt` layers of `model`, by name.

    On CPUs with AVX512-BF16, `Linear4bit` would by default run a kernel that rounds the 16 NF4 quantiles to bf16 first, and so
    multiplies with weights up to 0.8 % away from those that every other CPU and GPU multiplies with (bitsandbytes 0.50,
    gemv_4bit_inference_cpu_nf4_bf16). It is turned off here: the weights are dequantized, then multiplied, the same everywhere.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Let the layers of `model` compute in `dtype`."""
        self._in_4bit: dict[str, Any] = {}
        self._in_8bit: dict[str, Any] = {}
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.compute_dtype, module.compute_type_is_set = dtype, True
                module.support_avx512bf16_for_cpu = False
                self._in_4bit[name] = module
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                self._in_8bit[name] = module

    def owns(self, name: str) -> bool:
        """Whether the tensor `name` of a weights file belongs to one of the layers, and is no bias."""
        return self._split(name) is not None

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Copy the new weight of every layer out of `tensors`; the layers compute with them once the returned function is called.

        Raises `EngineError` for tensors that bitsandbytes does not take; nothing is changed then.
        """
        parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in (*self._in_4bit, *self._in_8bit)}
        for name, tensor in tensors.items():
            place = self._split(name)
            if place is not None:
                parts[place[0]][place[1]] = tensor
        made: list[tuple[Any, torch.nn.Parameter]] = []
        for name, given in parts.items():
            try:
                if name in self._in_4bit:
                    made.append((self._in_4bit[name], self._weight_4bit(self._in_4bit[name], given)))
                else:
                    made.append((self._in_8bit[name], self._weight_8bit(self._in_8bit[name], given)))
            except (AssertionError, AttributeError, KeyError, ValueError) as error:
                raise EngineError(f"{name}: bitsandbytes does not take these tensors; nothing was changed: {error!r}") from error

        def install() -> None:
            for layer, weight in made:
                layer.weight = weight
                if isinstance(weight, bitsandbytes.nn.Params4bit):
                    layer.quant_state = weight.quant_state

        return install

    def _split(self, name: str) -> tuple[str, str] | None:
        """(layer, part) of a tensor's name: the part is `weight`, `weight.absmax` and so on, or `SCB`."""
        head, _, last = name.rpartition(".")
        if head in self._in_8bit and last != "bias":
            return head, last
        layer, found, rest = name.rpartition(f".{_WEIGHT}")
        if found and layer in self._in_4bit and (not rest or rest.startswith(".")):
            return layer, _WEIGHT + rest
        return None

    def _weight_4bit(self, layer: Any, given: Mapping[str, torch.Tensor]) -> torch.nn.Parameter:
        device, old = layer.weight.device, layer.weight.quant_state
        copies = {part: tensor.to(device, copy=True) for part, tensor in given.items()}
        values = copies.pop(_WEIGHT)
        weight = bitsandbytes.nn.Params4bit.from_prequantized(values, copies, requires_grad=False, device=device)
        new = weight.quant_state
        if (new.shape, new.blocksize, new.quant_type) != (old.shape, old.blocksize, old.quant_type):
            raise ValueError(
                f"{new.quant_type} {list(new.shape)} in blocks of {new.blocksize}; "
                f"the layer is {old.quant_type} {list(old.shape)} in blocks of {old.blocksize}"
            )
        weight.module = layer
        return weight  # type: ignore[no-any-return]

    def _weight_8bit(self, layer: Any, given: Mapping[str, torch.Tensor]) -> torch.nn.Parameter:
        values, scales = (given[part].to(layer.weight.device, copy=True) for part in (_WEIGHT, _SCALES))
        # With `CB` set, the layer takes both over into its state at the next forward pass.
        return bitsandbytes.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)  # type: ignore[no-any-return]
