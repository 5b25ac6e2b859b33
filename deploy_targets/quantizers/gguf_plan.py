"""Which tensors a GGUF file holds, in which order, shape and type: all of it follows from `config.json` and the scheme.

The types are those that llama.cpp's `llama_model_quantize` chooses without an importance matrix; the rules are those of
`llama_tensor_get_type_impl` and `tensor_type_fallback` in src/llama-quant.cpp, for dense Llama and Qwen models
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp). The tests hold every type and byte against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, TensorNameMap, get_tensor_name_map, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

from deploy_targets.gguf_file import ALIGNMENT

FAMILIES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
SCHEMES = {
    "Q4_K_M": (FileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "Q3_K_S": (FileType.MOSTLY_Q3_K_S, Type.Q3_K),
    "Q2_K": (FileType.MOSTLY_Q2_K, Type.Q2_K),
    "Q4_0": (FileType.MOSTLY_Q4_0, Type.Q4_0),
    "Q8_0": (FileType.MOSTLY_Q8_0, Type.Q8_0),
    "F16": (FileType.MOSTLY_F16, Type.F16),
    "F32": (FileType.ALL_F32, Type.F32),
}
"""scheme.name -> llama.cpp's file type, and the type of most of its tensors."""
ROPE_FACTORS = "rope_freqs.weight"
"""The only tensor that no checkpoint holds: made from `rope_parameters` of type llama3."""

_BLOCK_SIZES = {
    **dict.fromkeys((Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K), 256),
    **dict.fromkeys((Type.Q4_0, Type.Q5_0, Type.Q5_1, Type.Q8_0), 32),
}
_FALLBACKS = {
    Type.Q2_K: Type.Q4_0, Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of the file."""

    source: str
    """Its name in a Hugging Face checkpoint; `rope_freqs.weight` has none."""
    name: str
    """Its name in the GGUF file."""
    shape: tuple[int, ...]
    """As torch writes it: rows first, inputs last."""
    type: Type
    """How its values are stored."""
    offset: int
    """Where its bytes begin, from the start of the data."""
    num_heads: int = 0
    """Where positive, the rows of each of so many heads are interleaved for llama.cpp's kind of rotary embedding."""

    @property
    def num_bytes(self) -> int:
        """Length of its bytes."""
        count = 1
        for size in quant_shape_to_byte_shape(self.shape, self.type) if self.type not in (Type.F32, Type.F16) else self.shape:
            count *= size
        return count * {Type.F32: 4, Type.F16: 2}.get(self.type, 1)


def plan_of(config: Mapping[str, Any], scheme: str) -> dict[str, Place]:
    """Source name -> place of every tensor, in the order of the file. `config` must have passed `config_problems`."""
    names = get_tensor_name_map(FAMILIES[config["model_type"]], config["num_hidden_layers"])
    places: dict[str, Place] = {}
    offset = 0
    for source, shape in _shapes(config):
        kind = _kind(source)
        ggml_type = Type.F32 if kind is None else _type(kind, source, shape[-1], config, scheme)
        num_heads = {"attn_q": config["num_attention_heads"], "attn_k": num_kv_heads(config)}.get(kind or "", 0)
        place = Place(source, _target(names, source), shape, ggml_type, offset, num_heads if config["model_type"] == "llama" else 0)
        places[source] = place
        offset += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
    return places


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Why the model cannot become a GGUF file of this project, one line each."""
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        return [f"model_type {family!r} is not one of {', '.join(FAMILIES)}"]
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    problems = [
        f"config.json: {key} must be a positive number" for key in needed if not (isinstance(config.get(key), int) and config[key] > 0)
    ]
    for key in ("use_sliding_window", "mlp_bias", "attention_bias"):
        if config.get(key):
            problems.append(f"config.json: {key} is not supported in a GGUF target")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"config.json: hidden_act {config['hidden_act']!r}: llama.cpp computes silu for this family")
    kind, rope = rope_parameters(config)
    kinds = ("default", "linear", "llama3") if family == "llama" else ("default", "linear")
    if kind not in kinds or rope.get("partial_rotary_factor", 1) != 1:
        problems.append(f"config.json: rotary embeddings of type {kind!r}, or of a part of each head, are not supported in a GGUF target")
    return problems


def rope_parameters(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The type of the rotary embedding and its parameters, `rope_theta` among them, in the old or the new notation of config.json."""
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    rope = {**old, **(config.get("rope_parameters") or {})}
    return str(rope.get("rope_type", rope.get("type", "default"))), rope


def head_dim(config: Mapping[str, Any]) -> int:
    """Size of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def num_kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint and its shape."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], head_dim(config)
    queries, keys = config["num_attention_heads"] * dim, num_kv_heads(config) * dim
    vocabulary = (config["vocab_size"], hidden)
    yield "model.embed_tokens.weight", vocabulary
    if rope_parameters(config)[0] == "llama3":
        yield ROPE_FACTORS, (dim // 2,)
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        yield f"{base}.input_layernorm.weight", (hidden,)
        for part, size in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{base}.self_attn.{part}_proj.weight", (size, hidden)
            if config["model_type"] == "qwen2":
                yield f"{base}.self_attn.{part}_proj.bias", (size,)
        if config["model_type"] == "qwen3":
            yield f"{base}.self_attn.q_norm.weight", (dim,)
            yield f"{base}.self_attn.k_norm.weight", (dim,)
        yield f"{base}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{base}.post_attention_layernorm.weight", (hidden,)
        yield f"{base}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{base}.mlp.up_proj.weight", (inner, hidden)
        yield f"{base}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", vocabulary


def _target(names: TensorNameMap, source: str) -> str:
    if source == ROPE_FACTORS:
        return source
    name = names.get_name(source, try_suffixes=(".weight", ".bias"))
    assert name is not None, f"gguf knows no name for {source}"
    return str(name)


def _kind(source: str) -> str | None:
    """What llama.cpp's rules tell apart; None for the tensors that stay in float32 (norms, biases)."""
    if source.endswith("norm.weight") or source.endswith(".bias") or source == ROPE_FACTORS:
        return None
    kinds = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "down_proj": "ffn_down",
        "lm_head": "output",
        "embed_tokens": "embedding",
    }
    return kinds.get(source.split(".")[-2], "other")


def _type(kind: str, source: str, num_inputs: int, config: Mapping[str, Any], scheme: str) -> Type:
    chosen = default = SCHEMES[scheme][1]
    if default not in _BLOCK_SIZES:
        return default
    if kind == "output" or (kind == "embedding" and config.get("tie_word_embeddings")):
        chosen = Type.Q8_0 if num_inputs % _BLOCK_SIZES[default] or default == Type.Q8_0 else Type.Q6_K
    elif scheme == "Q4_K_M" and kind in ("attn_v", "ffn_down"):
        if _gets_more_bits(int(source.split(".")[2]), config["num_hidden_layers"]):
            chosen = Type.Q6_K
    elif scheme == "Q2_K" and kind in ("attn_v", "ffn_down", "attn_output"):
        many = config["num_attention_heads"] // num_kv_heads(config) >= 4
        chosen = Type.Q4_K if kind == "attn_v" and many else Type.Q3_K
    if kind == "attn_v" and chosen in (Type.Q3_K, Type.Q4_K) and _counts_as_70b(config):
        chosen = Type.Q5_K
    if num_inputs % _BLOCK_SIZES[chosen]:
        chosen = _FALLBACKS.get(chosen, chosen)
        if num_inputs % _BLOCK_SIZES[chosen]:
            return Type.F16
    return chosen


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _counts_as_70b(config: Mapping[str, Any]) -> bool:
    """What llama.cpp calls LLM_TYPE_70B, by the number of layers alone: eight query heads share one value head there."""
    if config["num_hidden_layers"] != 80:
        return False
    family, num_heads = str(config["model_type"]), int(config["num_attention_heads"])
    return family == "qwen2" or (family == "llama" and num_kv_heads(config) != num_heads)
