"""What the quantizers of linear layers for vLLM share: which tensors they take, what fits, and the way through a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deploy_targets.families import ROUTERS, has_experts, is_expert
from deploy_targets.quantizers.awq import FAMILIES
from deploy_targets.quantizers.model_files import is_ignored, is_tied_copy, read_config, unmatched_ignores, write_model_files

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec
    from deploy_targets.quantizers.int4_rounding import Int4Rounding

HEAD = "lm_head"
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Layers that vLLM runs as one matrix: they are all quantized, or none of them is."""


class LayerWeights(Protocol):
    """The weight of one layer under one scheme."""

    @property
    def tile(self) -> int:
        """Input and output sizes are multiples of this."""
        ...

    @property
    def group_size(self) -> int | None:
        """Input channels that share a scale; None: all of them."""
        ...

    def encode(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is stored for the weight `name`."""
        ...

    def decode(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What the kernels multiply with in place of the weight `name`."""
        ...


class LinearQuantizer:
    """Base of the quantizers that give every linear layer but the ignored ones, and the routers of experts, the same scheme."""

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any], weights: LayerWeights, rounding: Int4Rounding | None) -> None:
        """Take `ignore` (absent: `lm_head`) from the scheme; `rounding` is that of `weights` where it can be calibrated."""
        self._weights, self._rounding = weights, rounding
        self._model_config = model_config
        self._asked_ignore = scheme.ignore or ()
        self._ignore = (HEAD,) if scheme.ignore is None else scheme.ignore
        if has_experts(model_config):
            self._ignore = (*self._ignore, *ROUTERS)

    @property
    def needs_calibration(self) -> bool:
        """Whether the algorithm rounds by the inputs of layers."""
        return self._rounding is not None and self._rounding.needs_calibration

    def calibrate(self, tensors: Iterable[tuple[str, torch.Tensor]], grams: Mapping[str, torch.Tensor]) -> None:
        """Round by `grams` from now on. Raises `WeightsError` for one that is not finite."""
        if self._rounding is not None:
            self._rounding.calibrate(tensors, {name: gram for name, gram in grams.items() if self.quantizes(name)})

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor that the format or vLLM's kernels cannot take, and every `ignore` without effect: one line each, with the reason."""
        tied = is_tied_copy(f"{HEAD}.weight", self._model_config)
        found = unmatched_ignores(self._asked_ignore, [*(name.rpartition(".")[0] for name in shapes), *([HEAD] if tied else [])])
        if tied and not is_ignored(HEAD, self._ignore):
            found.append(f"{HEAD}: it is the embedding, which is not quantized; list {HEAD!r} under scheme.ignore, or leave the key out")
        found += self._family_offenders()
        tile = self._weights.tile
        fused: dict[str, list[str]] = defaultdict(list)
        for name, shape in shapes.items():
            layer, _, module = name.removesuffix(".weight").rpartition(".")
            if module in _FUSED and name.endswith(".weight"):
                fused[f"{layer}.{_FUSED[module]}"].append(name)
            if not self.quantizes(name):
                continue
            if len(shape) != 2:
                found.append(f"{name} {list(shape)}: only matrices are quantized; add the module to scheme.ignore")
                continue
            group_size = self._weights.group_size or shape[1]
            if shape[1] % group_size:
                found.append(f"{name} {list(shape)}: group_size {group_size} does not divide the input size {shape[1]}")
            if shape[1] % tile:
                found.append(f"{name} {list(shape)}: the input size {shape[1]} is no multiple of {tile}")
            if module not in _FUSED and shape[0] % tile:
                found.append(f"{name} {list(shape)}: the output size {shape[0]} is no multiple of {tile}")
        for fused_name, parts in fused.items():
            quantized = [name for name in parts if self.quantizes(name)]
            if quantized and len(quantized) < len(parts):
                kept = ", ".join(name for name in parts if name not in quantized)
                found.append(f"{fused_name}: vLLM runs {len(parts)} layers as one, but scheme.ignore keeps only some of them: {kept}")
            out_size = sum(shapes[name][0] for name in quantized)
            if out_size % tile:
                found.append(f"{fused_name}: the joint output size {out_size} of {', '.join(quantized)} is no multiple of {tile}")
        return found + _expert_offenders(shapes, [name for name in shapes if is_expert(name) and self.quantizes(name)])

    def _family_offenders(self) -> list[str]:
        """AWQ has to know what feeds what."""
        family = self._model_config.get("model_type")
        if self._rounding is None or self._rounding.algorithm != "awq" or family in FAMILIES:
            return []
        return [
            f"config.json: AWQ folds its scales into the norms of {', '.join(FAMILIES)}, and model_type is {family!r}; "
            "use scheme.algorithm = 'gptq'"
        ]

    def quantizes(self, name: str) -> bool:
        """Whether `name` is the weight of a linear layer that `scheme.ignore` does not keep in high precision."""
        if not name.endswith(".weight"):
            return False
        module = name.removesuffix(".weight")
        last = module.rpartition(".")[2]
        if "norm" in last or "embed" in last:
            return False
        return not is_ignored(module, self._ignore)

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as their scheme stores them; other tensors as bf16 under their own names."""
        for name, tensor in tensors:
            if is_tied_copy(name, self._model_config):
                continue
            if self.quantizes(name):
                yield from self._weights.encode(name, tensor)
            else:
                yield name, tensor.detach().to(torch.bfloat16) if self._rounding is None else self._rounding.folded(name, tensor)

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The matrix that the kernels multiply with; what AWQ folds into other layers is taken out again."""
        return self._weights.decode(name, weight) if self.quantizes(name) else weight

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Write `config.json` with its `quantization_config`, and copy tokenizer and generation config."""
        config = read_config(model_dir)
        config["quantization_config"] = self._quantization_config(out_dir)
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
        write_model_files(model_dir, out_dir, config)

    def _quantization_config(self, out_dir: Path) -> dict[str, Any]:
        """What a reader of the format needs to know; `out_dir` already holds the weights."""
        raise NotImplementedError


def _expert_offenders(shapes: Mapping[str, tuple[int, ...]], quantized: list[str]) -> list[str]:
    """Experts that are stored as one tensor, and layers of which `scheme.ignore` keeps only some experts."""
    found = [
        f"{name} {list(shape)}: experts are quantized one by one, and this checkpoint stores them as one tensor"
        for name, shape in shapes.items()
        if is_expert(name) and len(shape) == 3
    ]
    some = {name.partition(".experts.")[0] for name in quantized}
    kept = sorted({name.partition(".experts.")[0] for name in shapes if is_expert(name) and name not in quantized} & some)
    return found + [f"{layer}.experts: vLLM runs them as one layer, but scheme.ignore keeps only some of their weights" for layer in kept]
