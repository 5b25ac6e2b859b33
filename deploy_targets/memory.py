"""Whether a model fits a target's memory, by arithmetic on shapes: checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy_targets.device import runs_on_gpu
from deploy_targets.engines.options import parsed_options
from deploy_targets.hardware import describe_machine, gpu_memory_gib
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Quantizer

_GIB = 2**30
_GPU_RESERVE_GIB = 1.0
"""CUDA context, kernels' workspace and activations of a small batch; a lower bound, so that only what is hopeless is refused."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """GiB that serving takes at least: the weights, and the KV cache of `num_sequences` sequences of the longest length."""

    weights_gib: float
    kv_gib: float
    num_sequences: int


def memory_need(
    profile: TargetProfile, quantizer: Quantizer, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> MemoryNeed:
    """The arithmetic: b / 8 bytes a weight of b bits, two or four a scale or other value; a token caches 2 x layers x KV heads x head_dim.

    `config` is the language model's part of `config.json`, `shapes` name -> shape of every tensor of the checkpoint.
    """
    scheme, value_bytes, scale_bytes = profile.scheme, _value_bytes(profile), _scale_bytes(profile)
    num_bytes = 0.0
    for name, shape in shapes.items():
        count = math.prod(shape)
        if quantizer.quantizes(name):
            group_size = scheme.group_size or (shape[-1] if shape else 1)
            num_bytes += count * scheme.bits / 8 + count / group_size * scale_bytes
        else:
            num_bytes += count * value_bytes
    num_sequences = parsed_options(profile.engine.name, profile.engine.options).num_cached_sequences()
    kv_bytes = _kv_bytes_per_token(profile, config) * max_tokens(profile, config) * num_sequences
    return MemoryNeed(num_bytes / _GIB, kv_bytes / _GIB, num_sequences)


def memory_offenders(
    profile: TargetProfile, quantizer: Quantizer, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Why the model does not fit: one line, with the sum. Empty when it does.

    The memory is `hardware.memory_gib` of the profile; without one it is that of this machine's GPU where the target runs on it, else
    its own.
    """
    need = memory_need(profile, quantizer, config, shapes)
    options = profile.engine.options
    on_gpu = runs_on_gpu(profile)
    found = gpu_memory_gib() if on_gpu else describe_machine().memory_gib
    whole = profile.hardware.memory_gib or found
    if whole is None:
        return []
    usable = whole * (options.get("gpu_memory_utilization") or 1.0)
    reserve = _GPU_RESERVE_GIB if on_gpu else 0.0
    kv_gib = max(need.kv_gib, float(options.get("kv_cache_gib") or 0.0))
    lines = []
    total = need.weights_gib + kv_gib + reserve
    if total > usable:
        kv = f"{kv_gib:.1f} GiB of KV cache"
        if not options.get("kv_cache_gib"):
            count = "one sequence" if need.num_sequences == 1 else f"{need.num_sequences} sequences"
            kv += f" for {count} of {max_tokens(profile, config)} tokens"
        fewer = "" if need.num_sequences == 1 else "fewer sequences at a time (engine.options.max_batch_size, num_threads), "
        extra = f" + {reserve:.1f} GiB for the rest" if reserve else ""
        lines.append(
            f"memory: {need.weights_gib:.1f} GiB of weights + {kv}{extra} = {total:.1f} GiB, and the target has {usable:.1f} GiB. "
            f"Choose {fewer}fewer bits, a smaller model, a lower max_model_len, or a KV cache in FP8"
        )
    if options.get("kv_cache_gib") and need.kv_gib > float(options["kv_cache_gib"]):
        lines.append(
            f"engine.options.kv_cache_gib: {options['kv_cache_gib']} GiB do not hold one sequence of {max_tokens(profile, config)} tokens, "
            f"which takes {need.kv_gib:.2f} GiB; raise it or lower max_model_len"
        )
    return lines


def max_tokens(profile: TargetProfile, config: Mapping[str, Any]) -> int:
    """Longest sequence that target and model allow."""
    limit = int(profile.engine.options.get("max_model_len", profile.max_model_len))
    positions = config.get("max_position_embeddings")
    return min(limit, positions) if isinstance(positions, int) else limit


def _kv_bytes_per_token(profile: TargetProfile, config: Mapping[str, Any]) -> float:
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    head_dim = config.get("head_dim") or int(config.get("hidden_size") or 0) // int(config.get("num_attention_heads") or 1)
    width = parsed_options(profile.engine.name, profile.engine.options).cache_bytes(_value_bytes(profile))
    return 2.0 * int(config.get("num_hidden_layers") or 0) * int(heads) * int(head_dim) * width


def _value_bytes(profile: TargetProfile) -> int:
    """Bytes of a value that is not quantized, as the engine holds it."""
    scheme = profile.scheme
    if scheme.quantizer.startswith("onnx-"):  # graphs for CPUs are float32 throughout, but for the scheme FP16
        return 2 if scheme.provider == "cuda" or scheme.bits == 16 else 4
    if scheme.quantizer == "gguf":
        return 4
    return 4 if profile.engine.options.get("dtype") == "float32" else 2


def _scale_bytes(profile: TargetProfile) -> int:
    return _value_bytes(profile) if profile.scheme.quantizer.startswith("onnx-") else 2
