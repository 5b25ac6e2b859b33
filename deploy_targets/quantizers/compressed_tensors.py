"""Checkpoints of compressed-tensors, which vLLM and transformers load unchanged; compressed_weights.py has the schemes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

from deploy_targets.errors import ProfileError
from deploy_targets.families import ROUTERS, has_experts, is_expert
from deploy_targets.quantizers.compressed_weights import SCHEMES
from deploy_targets.quantizers.model_files import is_ignored, is_tied_copy, read_config, unmatched_ignores, write_model_files

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec

_HEAD = "lm_head"
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Layers that vLLM runs as one matrix: they are all quantized, or none of them is."""


class CompressedTensorsQuantizer:
    """Round-to-nearest on the symmetric grid of one of `SCHEMES`. The routers of a mixture of experts are never quantized."""

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Take name, `group_size` and `ignore` (absent: `lm_head`) from the scheme.

        Raises `ProfileError` with everything in the scheme that this quantizer cannot do.
        """
        made = SCHEMES.get(scheme.name)
        if made is None:
            wrong = [f"scheme.name: {' and '.join(SCHEMES)} are made here (got {scheme.name!r})"]
        else:
            wrong = made.problems(scheme)
            if scheme.bits != made.bits:
                wrong.append(f"scheme.bits: {scheme.name} has {made.bits} bits (got {scheme.bits})")
        if not scheme.symmetric:
            wrong.append("scheme.symmetric: zero points are not written (got false)")
        if wrong or made is None:
            raise ProfileError("the quantizer 'compressed-tensors' cannot make this scheme", wrong)
        self._weights = made(scheme)
        self._model_config = model_config
        self._asked_ignore = scheme.ignore or ()
        self._ignore = (_HEAD,) if scheme.ignore is None else scheme.ignore
        if has_experts(model_config):
            self._ignore = (*self._ignore, *ROUTERS)

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor that the format or vLLM's kernels cannot take, and every `ignore` without effect: one line each, with the reason."""
        tied = is_tied_copy(f"{_HEAD}.weight", self._model_config)
        found = unmatched_ignores(self._asked_ignore, [*(name.rpartition(".")[0] for name in shapes), *([_HEAD] if tied else [])])
        if tied and not is_ignored(_HEAD, self._ignore):
            found.append(f"{_HEAD}: it is the embedding, which is not quantized; list {_HEAD!r} under scheme.ignore, or leave the key out")
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
        found += _expert_offenders(shapes, [name for name in shapes if is_expert(name) and self.quantizes(name)])
        return found

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
            if not self.quantizes(name):
                yield name, tensor.detach().to(torch.bfloat16)
                continue
            for suffix, stored in self._weights.encode(tensor):
                yield f"{name}{suffix}", stored

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The matrix that the kernels multiply with."""
        return self._weights.decode(weight) if self.quantizes(name) else weight

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Write `config.json` with its `quantization_config`, and copy tokenizer and generation config."""
        config = read_config(model_dir)
        config["quantization_config"] = self._quantization_config()
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
        write_model_files(model_dir, out_dir, config)

    def _quantization_config(self) -> dict[str, Any]:
        weights, activations = self._weights.arguments()
        format_name = self._weights.format.value
        # vLLM's output head is no Linear: it is quantized when a target names it.
        targets = ["Linear"] if is_ignored(_HEAD, self._ignore) else ["Linear", _HEAD]
        scheme = QuantizationScheme(targets=targets, weights=weights, input_activations=activations, format=format_name)
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=list(self._ignore),
            format=format_name,
            quantization_status=QuantizationStatus.COMPRESSED,
        )
        # Through JSON, so that enums become the strings that readers expect.
        return {"quant_method": "compressed-tensors", **config.model_dump(mode="json", exclude_none=True)}


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
