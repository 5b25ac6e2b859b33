"""INT4 weights (W4A16) in the `pack-quantized` format of compressed-tensors, which vLLM and transformers load unchanged.

Format: https://github.com/vllm-project/compressed-tensors. A weight [out, in] becomes `weight_packed` int32
[out, in / 8] (eight values a word, lowest bits first, stored with an offset of 8), `weight_scale` bf16
[out, in / group_size] and `weight_shape` int64 [2].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus

from deploy_targets.errors import ProfileError
from deploy_targets.quantizers.model_files import is_ignored, is_tied_copy, read_config, unmatched_ignores, write_model_files

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec

_HEAD = "lm_head"
_SCALE_DTYPE = torch.bfloat16
_Q_MIN, _Q_MAX = -8, 7
_CPU_TILE = 32
"""vLLM's CPU kernel takes input and output sizes in multiples of this (CPUWNA16LinearKernel.can_implement)."""
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Layers that vLLM runs as one matrix: they are all quantized, or none of them is."""


class CompressedTensorsQuantizer:
    """Round-to-nearest INT4 with one bf16 scale per group of input channels, symmetric around zero."""

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Take `group_size` (None: one scale per output channel) and `ignore` (absent: `lm_head`) from the scheme.

        Raises `ProfileError` with everything in the scheme that this quantizer cannot do.
        """
        wrong = []
        if scheme.name != "W4A16":
            wrong.append(f"scheme.name: only W4A16 is made here (got {scheme.name!r})")
        if scheme.bits != 4:
            wrong.append(f"scheme.bits: W4A16 has 4 bits (got {scheme.bits})")
        if not scheme.symmetric:
            wrong.append("scheme.symmetric: zero points are not written (got false)")
        if scheme.group_size is not None and scheme.group_size % 2:
            wrong.append(f"scheme.group_size: vLLM's CPU kernel wants an even group (got {scheme.group_size})")
        if wrong:
            raise ProfileError("the quantizer 'compressed-tensors' cannot make this scheme", wrong)
        self._model_config = model_config
        self._group_size = scheme.group_size
        self._asked_ignore = scheme.ignore or ()
        self._ignore = (_HEAD,) if scheme.ignore is None else scheme.ignore

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor that the format or vLLM's kernels cannot take, and every `ignore` without effect: one line each, with the reason."""
        tied = is_tied_copy(f"{_HEAD}.weight", self._model_config)
        found = unmatched_ignores(self._asked_ignore, [*(name.rpartition(".")[0] for name in shapes), *([_HEAD] if tied else [])])
        if tied and not is_ignored(_HEAD, self._ignore):
            found.append(f"{_HEAD}: it is the embedding, which is not quantized; list {_HEAD!r} under scheme.ignore, or leave the key out")
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
            group_size = self._group_size or shape[1]
            if shape[1] % group_size:
                found.append(f"{name} {list(shape)}: group_size {group_size} does not divide the input size {shape[1]}")
            if shape[1] % _CPU_TILE:
                found.append(f"{name} {list(shape)}: the input size {shape[1]} is no multiple of {_CPU_TILE}")
            if module not in _FUSED and shape[0] % _CPU_TILE:
                found.append(f"{name} {list(shape)}: the output size {shape[0]} is no multiple of {_CPU_TILE}")
        for fused_name, parts in fused.items():
            quantized = [name for name in parts if self.quantizes(name)]
            if quantized and len(quantized) < len(parts):
                kept = ", ".join(name for name in parts if name not in quantized)
                found.append(f"{fused_name}: vLLM runs {len(parts)} layers as one, but scheme.ignore keeps only some of them: {kept}")
            out_size = sum(shapes[name][0] for name in quantized)
            if out_size % _CPU_TILE:
                found.append(f"{fused_name}: the joint output size {out_size} of {', '.join(quantized)} is no multiple of {_CPU_TILE}")
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
        """`weight` -> `weight_packed`, `weight_scale`, `weight_shape`; other tensors as bf16 under their own names."""
        for name, tensor in tensors:
            if is_tied_copy(name, self._model_config):
                continue
            if not self.quantizes(name):
                yield name, tensor.detach().to(_SCALE_DTYPE)
                continue
            values, scales = quantize_int4(tensor, self._group_size)
            yield f"{name}_packed", pack_int4(values)
            yield f"{name}_scale", scales
            yield f"{name}_shape", torch.tensor(tensor.shape, dtype=torch.int64)

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """INT4 value times bf16 scale, rounded to bf16: the matrix that the kernels multiply with."""
        if not self.quantizes(name):
            return weight
        values, scales = quantize_int4(weight, self._group_size)
        groups = values.to(_SCALE_DTYPE).view(*scales.shape, -1) * scales.unsqueeze(-1)
        return groups.view(weight.shape).to(weight.dtype)

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Write `config.json` with its `quantization_config`, and copy tokenizer and generation config."""
        config = read_config(model_dir)
        config["quantization_config"] = self._quantization_config()
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
        write_model_files(model_dir, out_dir, config)

    def _quantization_config(self) -> dict[str, Any]:
        weights = QuantizationArgs(
            num_bits=4,
            type="int",
            symmetric=True,
            strategy="channel" if self._group_size is None else "group",
            group_size=self._group_size,
        )
        # vLLM's output head is no Linear: it is quantized when a target names it.
        targets = ["Linear"] if is_ignored(_HEAD, self._ignore) else ["Linear", _HEAD]
        scheme = QuantizationScheme(targets=targets, weights=weights, format=CompressionFormat.pack_quantized.value)
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=list(self._ignore),
            format=CompressionFormat.pack_quantized.value,
            quantization_status=QuantizationStatus.COMPRESSED,
        )
        # Through JSON, so that enums become the strings that readers expect.
        return {"quant_method": "compressed-tensors", **config.model_dump(mode="json", exclude_none=True)}


def quantize_int4(weight: torch.Tensor, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest INT4 values of `weight` [out, in] and the scale of each group of `group_size` inputs (None: of each row).

    Returns int8 [out, in] in [-8, 7] and bf16 [out, in / group_size]. The scale is absmax / 7.5, as llm-compressor has
    it (half the 15 steps of the grid), rounded to bf16 before the values are found, so that they are the nearest ones
    on the grid that is served. A group of zeros has scale 1.
    """
    groups = weight.detach().to(_SCALE_DTYPE).float().view(weight.shape[0], -1, group_size or weight.shape[1])
    low, high = torch.aminmax(groups, dim=-1)
    scales = (torch.maximum(-low, high) / 7.5).to(_SCALE_DTYPE)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (groups / scales.unsqueeze(-1).float()).round_().clamp_(_Q_MIN, _Q_MAX)
    return values.to(torch.int8).view(weight.shape), scales


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack int8 [out, in] in [-8, 7] into int32 [out, in / 8], as `compressed_tensors.pack_to_int32` does.

    Two values are joined into a byte and four bytes reinterpreted as a (little-endian) word, which needs no int32
    temporaries and is an order of magnitude faster; equal bit for bit, which is tested.
    """
    nibbles = values.add(8).view(torch.uint8).contiguous()
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(torch.int32)
