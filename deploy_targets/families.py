"""Which models this project can train and serve, told from `config.json` and the names of the tensors alone.

No list of names: a decoder whose checkpoint is laid out as Llama's (`model.embed_tokens`, `model.layers.N.self_attn`, linear layers
stored [out, in]) is taken, and the proof at the start of a run holds its numbers against the engine's. Tested: Llama, Qwen2, Qwen3,
Qwen3-MoE, Phi-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EMBEDDING = "model.embed_tokens.weight"
ROUTERS = (r"re:.*\.(gate|router|shared_expert_gate)$",)
"""Modules that choose experts, in the notation of `scheme.ignore`: no quantizer touches them, as a small error there changes the expert."""
_MODALITIES = ("vision_config", "audio_config", "text_config", "image_config", "speech_config")
ROUTED = ("qwen3_moe",)
"""`model_type` of the mixtures of experts whose routes can be recorded and replayed: their routers' maths is known here."""
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether the model is a mixture of experts."""
    return any(config.get(key) for key in _NUM_EXPERTS)


def routes_problem(config: Mapping[str, Any]) -> str | None:
    """Why the routes of a model can be neither recorded nor replayed; None when they can."""
    kind = f"model_type {config.get('model_type')!r}"
    if not has_experts(config):
        return f"{kind} has no experts, so its tokens have no routes"
    if config.get("model_type") not in ROUTED:
        return f"the routes of {kind} are not known here, only those of {', '.join(ROUTED)}"
    return None


def is_expert(name: str) -> bool:
    """Whether the tensor `name` of a checkpoint belongs to an expert."""
    return ".experts." in name


def family_offenders(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why the model is of a kind that is not supported: one line, the first reason found. Empty when it is supported.

    `shapes`: name -> shape of every tensor of the checkpoint; empty when it could not be read, which is another offender's matter.
    """
    kind = f"model_type {config.get('model_type')!r} is not supported"
    if config.get("is_encoder_decoder"):
        return [f"{kind}: it has an encoder; choose a decoder-only language model"]
    modalities = [key for key in _MODALITIES if isinstance(config.get(key), dict)]
    if modalities:
        return [f"{kind}: config.json has {', '.join(modalities)}, a model of several modalities; save its language model alone"]
    if not shapes:
        return []
    if EMBEDDING not in shapes:
        return [
            f"{kind}: its checkpoint has no {EMBEDDING} and names layers its own way (e.g. {min(shapes)}), so how they are stored is "
            "unknown; choose a decoder that is laid out as Llama, Qwen or Phi-3 are"
        ]
    with_attention = {name.split(".")[2] for name in shapes if name.startswith("model.layers.") and ".self_attn." in name}
    without = [str(layer) for layer in range(int(config.get("num_hidden_layers") or 0)) if str(layer) not in with_attention]
    if without:
        return [
            f"{kind}: layers {', '.join(without)} have no self_attn (a state-space or linear-attention model); choose a plain transformer"
        ]
    return []
