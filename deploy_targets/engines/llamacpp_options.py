"""What a llama.cpp target can be told: readable without importing llama.cpp."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deploy_targets.engines.environment import num_usable_cores
from deploy_targets.engines.requests import EngineOptions


class LlamaCppOptions(EngineOptions):
    """The `[engine.options]` table of a llama.cpp target."""

    num_threads: int | None = Field(None, ge=1)
    """Cores to use; all that this process may use by default."""
    threads_per_batch: int = Field(1, ge=1)
    """Cores that share one batch. More than one pays for large models, or for single requests."""
    max_batch_size: int = Field(64, ge=1, le=256)
    """Sequences of one batch; there are num_threads / threads_per_batch batches at a time, each with a cache for so many."""
    max_batch_tokens: int = Field(1024, ge=32)
    """Tokens of one prefill or scoring pass; large vocabularies lower it, so that its logits take at most 256 MiB."""
    kv_cache_dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f16"
    """How keys and values are kept; llama.cpp's own default is f16."""
    flash_attention: bool = False
    """Attention as one operator: less memory, but on a CPU its sums over values are kept in f16 and long sequences are slower."""
    num_gpu_layers: int = Field(0, ge=0)
    """Layers that a build of llama.cpp with GPU support keeps on the GPU."""

    def num_batches(self) -> int:
        """Batches at a time, each with a context of its own."""
        return max(1, (self.num_threads or num_usable_cores()) // self.threads_per_batch)

    def num_cached_sequences(self) -> int:
        """llama.cpp allocates the cache of every context as a whole."""
        return self.num_batches() * self.max_batch_size

    def cache_bytes(self, value_bytes: float) -> float:
        """Those of `kv_cache_dtype`, whatever the file holds; q8_0 has 32 values of one byte and a scale of two."""
        return {"f32": 4, "q8_0": 34 / 32}.get(self.kv_cache_dtype, 2)

    @model_validator(mode="after")
    def _quantized_values_need_flash_attention(self) -> Self:
        if self.kv_cache_dtype == "q8_0" and not self.flash_attention:
            raise ValueError("kv_cache_dtype 'q8_0' needs flash_attention = true: llama.cpp has no other attention over quantized values")
        return self
