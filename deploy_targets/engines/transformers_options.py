"""What a transformers target can be told: readable without importing PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deploy_targets.engines.requests import EngineOptions


class TransformersOptions(EngineOptions):
    """The `[engine.options]` of a transformers target."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of weights and activations; logits are turned into log-probs in float32."""
    device: str = "auto"
    """`auto` (the first GPU when there is one, else the CPU), or a device as PyTorch names it."""
    score_batch_size: int = Field(32, ge=1)
    """Sequences scored in one forward pass; bounds the memory for logits."""
    return_routes: bool = False
    """Say of every sampled response which experts its tokens went to (mixtures of experts; `Generation.routes`)."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads, for `engine.process = "own"` alone; None takes every core that the process may use."""
