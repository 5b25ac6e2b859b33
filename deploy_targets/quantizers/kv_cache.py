"""What a KV cache of few bits makes of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from deploy_targets.hardware import find_gpus

if TYPE_CHECKING:
    import torch

    from deploy_targets.profile import TargetProfile

CacheRounding = Callable[["torch.Tensor"], "torch.Tensor"]
"""Keys or values as they are computed -> as they are read from the cache; same shape and dtype."""

_FLOAT8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""vLLM's name of a cache's dtype -> torch's."""
_MANTISSA_BITS = {"float8_e4m3fn": 3, "float8_e5m2": 2}


def cache_rounding(profile: TargetProfile) -> CacheRounding | None:
    """The rounding of the target's cache on this machine; None where it holds what it is given, or by rules that are not known here.

    GPUs round to nearest. vLLM 0.32 for CPUs cuts the digits off instead, which its documentation does not say: in the tests, the engine
    agrees with a twin that cuts five times better than with one that rounds.
    """
    name = profile.engine.options.get("kv_cache_dtype")
    if profile.engine.name != "vllm" or name not in _FLOAT8:
        return None
    return partial(round_float8 if find_gpus() else cut_float8, dtype=_FLOAT8[name])


def round_float8(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The nearest value of torch's float8 `dtype`, at scale 1 as vLLM has it without calibration; what is too large becomes the largest."""
    import torch

    float8 = getattr(torch, dtype)
    largest = torch.finfo(float8).max
    return values.to(torch.bfloat16).clamp(-largest, largest).to(float8).to(values.dtype)


def cut_float8(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The next value of torch's float8 `dtype` towards zero, otherwise as `round_float8`."""
    import torch

    info, mantissa_bits = torch.finfo(getattr(torch, dtype)), _MANTISSA_BITS[dtype]
    half = values.to(torch.bfloat16).clamp(-info.max, info.max)
    # bf16 has 7 digits of mantissa, and the exponents of both formats.
    cut = (half.view(torch.int16) & -(1 << 7 - mantissa_bits)).view(torch.bfloat16)
    step = info.smallest_normal * 2.0**-mantissa_bits
    return torch.where(half.abs() < info.smallest_normal, (half / step).trunc() * step, cut).to(values.dtype)
