"""Int4 weights in the layout of ONNX Runtime's MatMulNBits, bit for bit what onnxruntime-genai's model builder writes.

The builder needs seconds to minutes for a model; these are the same numbers as plain functions on tensors, fast enough
to run after every optimizer step. The grid is that of MLAS' blockwise quantizer
(https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/mlas/lib/q4_dq.cpp): a block of `group_size`
inputs shares one signed scale, the extreme value of the block divided by -8, so that the extreme always lands on code 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_targets.errors import PreflightError, WeightsError
from deploy_targets.quantizers.model_files import is_ignored, unmatched_ignores

if TYPE_CHECKING:
    import torch

    from deploy_targets.profile import SchemeSpec

FAMILIES = ("llama", "qwen2", "qwen3")
GROUP_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = {"W4A8": 4, "W4A16": 1}
"""Scheme name -> MatMulNBits `accuracy_level`: 4 rounds activations to int8 per block (the builder's default on CPU),
1 computes in float32 as a weight-only scheme promises."""

_HEAD = "lm_head"
_EMBEDDING = "model.embed_tokens"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_QKV = ("q_proj", "k_proj", "v_proj")
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.q_norm": "attn.q_norm.layernorm",
    "self_attn.k_norm": "attn.k_norm.layernorm",
}
_LINEARS = {
    **{f"self_attn.{part}": "attn.qkv_proj" for part in _QKV},
    "self_attn.o_proj": "attn.o_proj",
    **{f"mlp.{part}": f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
}


def quantize_blocks(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of a weight [N, K] on the MatMulNBits grid.

    Returns codes uint8 [N, K / group_size, group_size] in 0..15 and scales float32 [N, K / group_size] with
    weight ~ (code - 8) * scale. The code is round_half_away(w / scale + 8), the offset added before rounding, as MLAS
    does: on a tie the order decides.
    """
    import torch

    blocks = weight.float().reshape(weight.shape[0], -1, group_size)
    low, high = _along_blocks(torch.minimum, blocks), _along_blocks(torch.maximum, blocks)
    scales = torch.where(high.abs() > low.abs(), high, low) / -8
    reciprocal = torch.where(scales == 0, 0.0, scales.reciprocal())
    shifted = (blocks * reciprocal.unsqueeze(-1)).add_(8)
    return shifted.add_(0.5).clamp_(max=15).to(torch.uint8), scales


def _along_blocks(pick: Callable[..., torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
    """Reduce the last dimension by halving it; torch's own reductions are several times slower over so short a dimension."""
    while blocks.shape[-1] > 1:
        half = blocks.shape[-1] // 2
        blocks = pick(blocks[..., :half], blocks[..., half:])
    return blocks.squeeze(-1)


def pack_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Two codes to a byte, the earlier in the low half: uint8 [..., group_size] -> uint8 [..., group_size / 2]."""
    import torch

    pairs = codes.view(torch.int16)  # little-endian: the later code is the high byte
    return (pairs | pairs >> 4).to(torch.uint8)


def dequantize_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight [N, K] that MatMulNBits computes with: (code - 8) * scale."""
    return ((codes.float() - 8) * scales.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint tensor goes: its module, the graph's base name, and its turn among the packed parts."""

    module: str
    target: str
    kind: str
    """`norm`, `linear`, `bias` or `embedding`."""
    part: int = 0
    num_parts: int = 1


class OnnxMatMulNBitsQuantizer:
    """Checkpoint tensors -> the initializers of the graph that the model builder makes for `-p int4 -e cpu`.

    q, k and v become one packed `qkv_proj`; tied embeddings are stored once, as the quantized `lm_head`, which the graph
    also reads embeddings from; everything else is float32, as on the CPU provider.
    """

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Raises `PreflightError` for a scheme or a model family that has no such graph."""
        self.scheme = scheme
        self._ignore = scheme.ignore or ()
        self.group_size = scheme.group_size or 0
        self.family = str(model_config.get("model_type", ""))
        self.tied = bool(model_config.get("tie_word_embeddings", False))
        self.num_layers = int(model_config.get("num_hidden_layers", 0))
        self.vocab_size = int(model_config.get("vocab_size", 0))
        problems = []
        if self.family not in FAMILIES:
            problems.append(f"model_type {self.family!r} is not one of {', '.join(FAMILIES)}")
        if model_config.get("use_sliding_window"):
            problems.append("use_sliding_window: windowed attention is not supported")
        if scheme.name not in ACCURACY_LEVELS:
            problems.append(f"scheme.name {scheme.name!r} is not one of {', '.join(ACCURACY_LEVELS)}")
        if scheme.bits != 4:
            problems.append(f"scheme.bits must be 4, got {scheme.bits}")
        if self.group_size not in GROUP_SIZES:
            problems.append(f"scheme.group_size must be one of {GROUP_SIZES}, got {scheme.group_size}")
        if not scheme.symmetric:
            problems.append("scheme.symmetric must be true")
        if problems:
            raise PreflightError("the ONNX int4 target cannot hold this model", problems)

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor without a place in the graph, with an input size that the groups do not divide, or taken for the head."""
        lines, modules = [], set()
        for name, shape in shapes.items():
            place = self._place(name)
            if place is None:
                lines.append(f"{name}: a {self.family} graph has no place for this tensor")
                continue
            modules.add(place.module)
            if self.quantizes(name) and shape[-1] % self.group_size:
                lines.append(f"{name}: input size {shape[-1]} is not a multiple of group_size {self.group_size}")
            if place.kind == "linear" and place.module != _HEAD and shape[0] == self.vocab_size:
                # has_lm_head in onnxruntime_genai/models/builders/base.py (0.18) looks at nothing but the output size.
                reason = "the model builder takes it for the output head and makes a wrong graph; add unused tokens to the vocabulary"
                lines.append(f"{name}: its output size {shape[0]} is the size of the vocabulary; {reason}")
        if self.tied:
            modules.add(_HEAD)
        lines += unmatched_ignores(self._ignore, modules)
        for layer in range(self.num_layers):
            parts = [f"model.layers.{layer}.self_attn.{part}" for part in _QKV]
            kept = [part for part in parts if self._ignored(part)]
            if kept and len(kept) < len(parts):
                reason = "q, k and v are one packed matrix; ignore all three or none"
                lines.append(f"model.layers.{layer}.self_attn: {reason}, not {', '.join(kept)}")
        return lines

    def quantizes(self, name: str) -> bool:
        """Whether the tensor `name` is stored in 4 bits; a tied embedding is, together with the head."""
        place = self._place(name)
        if place is None or place.kind in ("norm", "bias"):
            return False
        if place.kind == "embedding":
            return self.tied and not self._ignored(_HEAD)
        return not self._ignored(place.module)

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the graph's initializers: `*.MatMul.weight_Q4` uint8 [N, K / g, g / 2], `*_scales` float32 [N, K / g], the rest float32.

        Packed parts wait for each other, so no more than one layer is held. Raises `WeightsError` for a tensor without a
        place in the graph and for parts that never arrive.
        """
        waiting: dict[str, dict[int, tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors:
            place = self._place(name)
            if place is None:
                raise WeightsError(f"tensor {name!r} has no place in the ONNX graph of a {self.family} model")
            if name == f"{_HEAD}.weight" and self.tied:
                continue  # the same matrix as the embedding, which some learners list twice
            parts = waiting.setdefault(place.target + place.kind, {})
            parts[place.part] = (name, tensor)
            if len(parts) == place.num_parts:
                del waiting[place.target + place.kind]
                yield from self._store(place, [parts[i] for i in range(place.num_parts)])
        if waiting:
            missing = ", ".join(sorted(name for parts in waiting.values() for name, _ in parts.values()))
            raise WeightsError(f"q, k and v are packed together, but the partners of these tensors are missing: {missing}")

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The values MatMulNBits computes with in place of `weight` [N, K], rounded to `weight`'s dtype."""
        if not self.quantizes(name):
            return weight
        return dequantize_blocks(*quantize_blocks(weight, self.group_size)).to(weight.dtype)

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Write graph, genai config and tokenizer into `out_dir`; every weight of the graph points into its `model.safetensors`.

        Raises `MissingPackageError` without the extra `onnx-export`, `EngineError` when the builder fails or its graph
        does not match the weights file.
        """
        from deploy_targets.quantizers.onnx_scaffold import scaffold

        accuracy_level = ACCURACY_LEVELS[self.scheme.name]
        scaffold(Path(model_dir), Path(out_dir), self.group_size, accuracy_level, self._excluded_nodes())

    def _store(self, place: _Place, parts: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The initializers that hold the packed `parts` of one place."""
        import torch

        whole = torch.cat([tensor.detach() for _, tensor in parts]) if len(parts) > 1 else parts[0][1].detach()
        if self.quantizes(parts[0][0]):
            base = f"{_HEAD}.MatMul.weight" if place.kind == "embedding" else f"{place.target}.MatMul.weight"
            codes, scales = quantize_blocks(whole, self.group_size)
            yield f"{base}_Q4", pack_blocks(codes)
            yield f"{base}_scales", scales
        elif place.kind == "linear":
            yield f"{place.target}.MatMul.weight", whole.float().T.contiguous()
        elif place.kind == "embedding" and self.tied:
            yield f"{_HEAD}.MatMul.weight", whole.float().T.contiguous()
        else:
            yield place.target, whole.float()

    def _place(self, name: str) -> _Place | None:
        fixed = {
            f"{_EMBEDDING}.weight": _Place(_EMBEDDING, f"{_EMBEDDING}.weight", "embedding"),
            "model.norm.weight": _Place("model.norm", f"model.layers.{self.num_layers}.final_norm_layernorm.weight", "norm"),
            f"{_HEAD}.weight": _Place(_HEAD, _HEAD, "linear"),
        }
        if name in fixed:
            return fixed[name]
        match = _LAYER.fullmatch(name)
        if match is None or int(match[1]) >= self.num_layers:
            return None
        layer, inner, kind = f"model.layers.{match[1]}", match[2], match[3]
        if inner in _NORMS and kind == "weight":
            return _Place(f"{layer}.{inner}", f"{layer}.{_NORMS[inner]}.weight", "norm")
        if inner not in _LINEARS:
            return None
        leaf = inner.rsplit(".", 1)[-1]
        part, num_parts = (_QKV.index(leaf), len(_QKV)) if leaf in _QKV else (0, 1)
        target = f"{layer}.{_LINEARS[inner]}"
        if kind == "bias":
            return _Place(f"{layer}.{inner}", f"{target}.Add.bias", "bias", part, num_parts)
        return _Place(f"{layer}.{inner}", target, "linear", part, num_parts)

    def _ignored(self, module: str) -> bool:
        return is_ignored(module, self._ignore)

    def _excluded_nodes(self) -> list[str]:
        """The builder's names of the nodes that stay in float32."""
        nodes = ["/lm_head/MatMul", "/model/embed_tokens/Gather"] if self._ignored(_HEAD) else []
        for layer in range(self.num_layers):
            for inner, target in _LINEARS.items():
                node = f"/model/layers.{layer}/{target.replace('.', '/')}/MatMul"
                if self._ignored(f"model.layers.{layer}.{inner}") and node not in nodes:
                    nodes.append(node)
        return nodes
