"""What a vLLM target can be told, and what it then cannot do: readable without importing vLLM, which takes many seconds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deploy_targets.engines.requests import EngineOptions


class VllmOptions(EngineOptions):
    """The `[engine.options]` of a vLLM target."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of activations and of weights that are not quantized."""
    enforce_eager: bool = False
    """Skip compilation and graph capture: starts faster, best for tiny models and on CPU."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Size of the KV cache in GiB; None leaves it to vLLM, which on a GPU takes nearly all memory."""
    kv_cache_dtype: str = "auto"
    """Dtype of the KV cache, as vLLM names it: auto, fp8, fp8_e5m2, ..."""
    attention_backend: str = "auto"
    """Kernel of attention, as vLLM names it (FLASH_ATTN, FLASHINFER, TRITON_ATTN, CPU_ATTN, ...); auto leaves it to vLLM."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the memory that vLLM may take; None leaves vLLM's default."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Most sequences decoded at once; None leaves vLLM's default."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Most tokens in one forward pass; None leaves vLLM's default."""
    enable_prefix_caching: bool = True
    """Share the KV cache of equal prompt beginnings within one call."""
    max_logprobs: int = Field(4096, ge=1)
    """Largest vocabulary for which `score` works at temperatures other than 1 (it then needs all log-probs)."""
    cpu_int4_w4a8: bool = True
    """On CPUs with AMX, vLLM rounds the activations of W4A16 layers to INT8; false keeps them in bf16."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads, for `engine.process = "own"` alone; None takes every core that the process may use."""

    def cache_bytes(self, value_bytes: float) -> float:
        """One in FP8, else as many as activations have."""
        return 1 if self.kv_cache_dtype.startswith("fp8") else value_bytes


def temperature_problem(options: VllmOptions, temperature: float, vocab_size: int) -> str | None:
    """Why the engine cannot score at `temperature` over `vocab_size` tokens; None when it can."""
    if temperature == 1 or vocab_size <= options.max_logprobs:
        return None
    return (
        f"vLLM's prompt log-probs ignore the temperature; scoring at {temperature} needs all {vocab_size} log-probs of "
        f"every token, but engine.options.max_logprobs is {options.max_logprobs}. Score at temperature 1 or raise it"
    )
