"""The metadata of a GGUF file: hyper-parameters from `config.json`, the tokenizer from `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, MODEL_ARCH_NAMES, GGUFWriter, LlamaFileType, RopeScalingType, SpecialVocab, TokenType

from deploy_targets.errors import ArtifactError
from deploy_targets.quantizers.gguf_plan import FAMILIES, head_dim, num_kv_heads, rope_parameters

SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
"""Regular expression of a byte-level tokenizer -> llama.cpp's name for it (src/llama-vocab.cpp)."""
_BYTE_LEVEL = {" ": "\u0120", "\n": "\u010a", "\t": "\u0109", "\r": "\u010d"}
"""How byte-level BPE writes the ASCII characters that are not printed (GPT-2's `bytes_to_unicode`)."""
_NO_MERGE = "\u0120\u0120 \u0120\u0120"
"""llama.cpp asks for a list of merges; no text reaches this one, whose parts would have to be merged before."""


def add_metadata(writer: GGUFWriter, config: Mapping[str, Any], file_type: LlamaFileType, model_dir: Path) -> None:
    """Add everything but the tensors to `writer`.

    The tokenizer is stored so that llama.cpp splits text as Hugging Face does, for byte-level BPE as Qwen, Llama 3 and GPT-2
    have it and for vocabularies of single ASCII characters; of any other only the size is stored (llama.cpp's `no_vocab`), and
    llama.cpp then speaks token ids alone, as this project does. Raises `ArtifactError` for a tokenizer that cannot be read.
    """
    writer.add_name(model_dir.name)
    writer.add_file_type(int(file_type))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(num_kv_heads(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    kind, rope = rope_parameters(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    _add_tokenizer(writer, config["vocab_size"], model_dir)


def new_writer(config: Mapping[str, Any]) -> GGUFWriter:
    """A writer for the architecture of `config`."""
    return GGUFWriter(None, MODEL_ARCH_NAMES[FAMILIES[config["model_type"]]])


def _add_tokenizer(writer: GGUFWriter, vocab_size: int, model_dir: Path) -> None:
    path = model_dir / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text("utf-8"))
        added = {int(entry["id"]): entry for entry in tokenizer.get("added_tokens") or ()}
        pieces = {int(index): str(piece) for piece, index in tokenizer["model"].get("vocab", {}).items()}
        kind = _kind(tokenizer, pieces, added)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be read as a tokenizer: {error!r}. Save it with save_pretrained") from error
    if kind is None:
        writer.add_tokenizer_model("no_vocab")
        return
    tokens, types = [], []
    for index in range(vocab_size):
        if index in added:
            tokens.append(str(added[index]["content"]))
            types.append(TokenType.CONTROL if added[index].get("special") else TokenType.USER_DEFINED)
        elif index in pieces:
            tokens.append(_BYTE_LEVEL.get(pieces[index], pieces[index]) if kind == "characters" else pieces[index])
            types.append(TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if kind == "characters" else kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(model_dir, load_merges=kind != "characters", n_vocab=vocab_size)
    if not special.merges:
        special.merges = [_NO_MERGE]
    special.add_to_gguf(writer, quiet=True)


def _kind(tokenizer: Mapping[str, Any], pieces: Mapping[int, str], added: Mapping[int, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer, `characters`, or None for a tokenizer that llama.cpp has no equal of."""
    if tokenizer["model"].get("type") == "WordLevel":
        normal = [piece for index, piece in pieces.items() if index not in added]
        return "characters" if all(len(piece) == 1 and (" " < piece <= "~" or piece in _BYTE_LEVEL) for piece in normal) else None
    splitter = tokenizer.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    if tokenizer["model"].get("type") != "BPE" or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    if len(steps) == 1:
        return "gpt-2" if steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space", False) else None
    if len(steps) == 2 and steps[0].get("type") == "Split":
        return SPLITS.get(str(steps[0].get("pattern", {}).get("Regex")))
    return None
