"""What a KV cache of few bits makes of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from deploy_targets.profile import TargetProfile

CacheRounding = Callable[["torch.Tensor"], "torch.Tensor"]
"""Keys or values as they are computed -> as they are read from the cache; same shape and dtype."""

_FLOAT8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""vLLM's name of a cache's dtype -> torch's."""


def cache_rounding(profile: TargetProfile) -> CacheRounding | None:
    """The rounding of the target's cache; None where it holds what it is given, or by rules that are not known here."""
    name = profile.engine.options.get("kv_cache_dtype")
    if profile.engine.name != "vllm" or name not in _FLOAT8:
        return None
    return partial(round_float8, dtype=_FLOAT8[name])


def round_float8(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The nearest FP8 value, at scale 1 as vLLM has it without calibration; what is too large becomes the largest."""
    import torch

    float8 = getattr(torch, dtype)
    largest = torch.finfo(float8).max
    return values.to(torch.bfloat16).clamp(-largest, largest).to(float8).to(values.dtype)
