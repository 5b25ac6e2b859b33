"""Where each checkpoint tensor goes in the graph that onnxruntime-genai's model builder makes, whatever its precision.

q, k and v become one packed `qkv_proj`; tied embeddings are stored once, as the output head, from which the graph also reads
embeddings; matrices that stay floating point are stored transposed, as MatMul wants them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deploy_targets.errors import WeightsError

if TYPE_CHECKING:
    import torch

FAMILIES = ("llama", "qwen2", "qwen3")
HEAD = "lm_head"
HEAD_NODES = ("/lm_head/MatMul", "/model/embed_tokens/Gather")
"""The builder's names of the nodes that read the output head, where it is tied the embedding's too."""
QKV = ("q_proj", "k_proj", "v_proj")
_EMBEDDING = "model.embed_tokens"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.q_norm": "attn.q_norm.layernorm",
    "self_attn.k_norm": "attn.k_norm.layernorm",
}
_LINEARS = {
    **{f"self_attn.{part}": "attn.qkv_proj" for part in QKV},
    "self_attn.o_proj": "attn.o_proj",
    **{f"mlp.{part}": f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint tensor goes: its module, the graph's base name, and its turn among the packed parts."""

    module: str
    """The module that a scheme's `ignore` names; `lm_head` for a tied embedding."""
    target: str
    kind: Literal["norm", "linear", "bias", "embedding"]
    """A tied embedding is `linear`: it is stored as the head."""
    part: int = 0
    num_parts: int = 1


class GraphPlaces:
    """The places in the graph of one model."""

    def __init__(self, model_config: Mapping[str, Any]) -> None:
        """`model_config` is the parsed `config.json`."""
        self.family = str(model_config.get("model_type", ""))
        self.tied = bool(model_config.get("tie_word_embeddings", False))
        self.num_layers = int(model_config.get("num_hidden_layers", 0))
        self._vocab_size = int(model_config.get("vocab_size", 0))
        self.problems = [] if self.family in FAMILIES else [f"model_type {self.family!r} is not one of {', '.join(FAMILIES)}"]
        """Why the model has no such graph, one line each."""
        if model_config.get("use_sliding_window"):
            self.problems.append("use_sliding_window: windowed attention is not supported")

    def find(self, name: str) -> Place | None:
        """The place of the tensor `name`, None where the graph has none."""
        fixed = {
            f"{_EMBEDDING}.weight": Place(HEAD, HEAD, "linear") if self.tied else Place(_EMBEDDING, f"{_EMBEDDING}.weight", "embedding"),
            "model.norm.weight": Place("model.norm", f"model.layers.{self.num_layers}.final_norm_layernorm.weight", "norm"),
            f"{HEAD}.weight": Place(HEAD, HEAD, "linear"),
        }
        if name in fixed:
            return fixed[name]
        match = _LAYER.fullmatch(name)
        if match is None or int(match[1]) >= self.num_layers:
            return None
        layer, inner, kind = f"model.layers.{match[1]}", match[2], match[3]
        if inner in _NORMS and kind == "weight":
            return Place(f"{layer}.{inner}", f"{layer}.{_NORMS[inner]}.weight", "norm")
        if inner not in _LINEARS:
            return None
        leaf = inner.rsplit(".", 1)[-1]
        part, num_parts = (QKV.index(leaf), len(QKV)) if leaf in QKV else (0, 1)
        target = f"{layer}.{_LINEARS[inner]}"
        if kind == "bias":
            return Place(f"{layer}.{inner}", f"{target}.Add.bias", "bias", part, num_parts)
        return Place(f"{layer}.{inner}", target, "linear", part, num_parts)

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor without a place in the graph, or that the builder would take for the output head."""
        lines = []
        for name, shape in shapes.items():
            place = self.find(name)
            if place is None:
                lines.append(f"{name}: a {self.family} graph has no place for this tensor")
            elif place.kind == "linear" and place.module != HEAD and shape[0] == self._vocab_size:
                # has_lm_head in onnxruntime_genai/models/builders/base.py (0.18) looks at nothing but the output size.
                reason = "the model builder takes it for the output head and makes a wrong graph; add unused tokens to the vocabulary"
                lines.append(f"{name}: its output size {shape[0]} is the size of the vocabulary; {reason}")
        return lines

    def gather(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[Place, str, torch.Tensor]]:
        """Each place with the name of its first tensor and the whole tensor, packed parts joined in their order.

        Packed parts wait for each other, so no more than one layer is held. Raises `WeightsError` for a tensor without a
        place in the graph and for parts that never arrive.
        """
        import torch

        waiting: dict[str, dict[int, tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors:
            place = self.find(name)
            if place is None:
                raise WeightsError(f"tensor {name!r} has no place in the ONNX graph of a {self.family} model")
            if name == f"{HEAD}.weight" and self.tied:
                continue  # the same matrix as the embedding, which some learners list twice
            parts = waiting.setdefault(place.target, {})
            parts[place.part] = (name, tensor.detach())
            if len(parts) == place.num_parts:
                del waiting[place.target]
                in_order = [parts[i] for i in range(place.num_parts)]
                yield place, in_order[0][0], torch.cat([part for _, part in in_order]) if len(in_order) > 1 else in_order[0][1]
        if waiting:
            missing = ", ".join(sorted(name for parts in waiting.values() for name, _ in parts.values()))
            raise WeightsError(f"q, k and v are packed together, but the partners of these tensors are missing: {missing}")

    def nodes(self, is_meant: Callable[[str], bool]) -> list[str]:
        """The builder's names of the nodes that multiply by the modules for which `is_meant` holds."""
        names = dict.fromkeys(HEAD_NODES if is_meant(HEAD) else ())
        for layer in range(self.num_layers):
            for inner, target in _LINEARS.items():
                if is_meant(f"model.layers.{layer}.{inner}"):
                    names[f"/model/layers.{layer}/{target.replace('.', '/')}/MatMul"] = None
        return list(names)


def float_initializer(place: Place, name: str, whole: torch.Tensor, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """Name and value of the initializer that holds `whole` without quantization, `dtype` float32 or float16.

    Raises `WeightsError` that names the tensor for values that only become infinite by the conversion.
    """
    values = to_float(name, whole, dtype)
    return (f"{place.target}.MatMul.weight", values.T.contiguous()) if place.kind == "linear" else (place.target, values)


def to_float(name: str, whole: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`whole` as `dtype`. Raises `WeightsError` that names the tensor for finite values beyond float16's largest, 65504."""
    import torch

    values = whole.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(values).all() and torch.isfinite(whole).all():
        raise WeightsError(
            f"tensor {name!r} holds {float(whole.abs().max()):g}, more than float16's largest value 65504; deploy it in float32"
        )
    return values
