"""Tiny random models, made on the spot: real Hugging Face checkpoints that every engine can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

Family = Literal["qwen3", "qwen2", "llama", "phi3", "qwen3_moe"]

CHARACTERS = "0123456789+-*/=()., abcdefghijklm"
SPECIALS = ("<pad>", "<bos>", "<eos>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
BIAS_STD = {"q_proj.bias": 2.0, "k_proj.bias": 2.0, "v_proj.bias": 0.2}
"""As in real Qwen2 models, those of queries and keys are large: in a small model attention would not notice small ones."""
READS_NORMED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")


def tiny_model(
    family: Family,
    folder: Path,
    *,
    hidden_size: int = 128,
    intermediate_size: int = 256,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    max_position_embeddings: int = 512,
    tied: bool = False,
    seed: int = 0,
    weight_std: float = 0.05,
    outlier: float = 1.0,
    extra_config: dict[str, Any] | None = None,
) -> Path:
    """Save a random bf16 checkpoint (`config.json`, `model.safetensors`, char-level `tokenizer.json`) in `folder`.

    `qwen2` has biases on q, k and v; it and `phi3` take their head_dim from hidden_size / num_heads. `phi3` has q, k and v in one matrix,
    gate and up in another, and rotates half of each head. `qwen3_moe` has four experts of 64 in each layer, two for each token. Norms and
    biases are random too, so that a tensor that gets lost or swapped changes the log-probs.

    With an `outlier` beyond 1, every 32nd weight of the rows that read a normed input is that many times larger, and the input it reads
    is zero: a grid that has to hold these weights rounds the others that much more coarsely, and nothing else changes. Returns `folder`.
    """
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    classes: dict[str, tuple[Any, Any]] = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    }
    of_family: dict[str, dict[str, Any]] = {
        "qwen2": {},
        "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "qwen3_moe": {
            "head_dim": head_dim,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    }
    config_class, model_class = classes[family]
    vocab_size = save_tokenizer(folder)
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tied,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        **{**of_family.get(family, {"head_dim": head_dim}), **(extra_config or {})},
    )
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            std = BIAS_STD.get(name.split("self_attn.")[-1], weight_std)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else std * noise)
            if outlier > 1 and name.endswith("layernorm.weight"):
                parameter[::32] = 0
            if outlier > 1 and name.endswith(READS_NORMED):
                parameter[:, ::32] *= outlier
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> int:
    """Write a char-level `tokenizer.json` and its config into `folder`; returns the vocabulary size, a multiple of 4."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: index for index, piece in enumerate((*SPECIALS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return len(vocabulary)
