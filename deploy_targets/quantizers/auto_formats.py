"""Checkpoints as AutoGPTQ and AutoAWQ write them; vLLM reads both. Which algorithm finds the values is a matter of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deploy_targets.errors import ProfileError
from deploy_targets.quantizers.int4_formats import Stored, awq_gemm, gptq_v1
from deploy_targets.quantizers.int4_grid import Int4Matrix
from deploy_targets.quantizers.int4_rounding import TILE, Int4Rounding
from deploy_targets.quantizers.linear_quantizer import HEAD, LinearQuantizer
from deploy_targets.quantizers.model_files import is_ignored
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import tensor_layout

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec


class _Int4Layers:
    """INT4 weights in one of the two formats, whose parts `stored` names."""

    tile = TILE

    def __init__(self, rounding: Int4Rounding, stored: Callable[[Int4Matrix], Stored]) -> None:
        self._rounding, self._stored = rounding, stored
        self.group_size = rounding.rule.group_size

    def encode(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the format, each named in place of the last part of `name`."""
        module = name.removesuffix("weight")
        return ((f"{module}{part}", tensor) for part, tensor in self._stored(self._rounding.rounded(name, weight)))

    def decode(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """(value - zero) times scale, rounded to bf16."""
        return self._rounding.dequantized(name, weight)


class _AutoQuantizer(LinearQuantizer):
    """What both formats share. Their scales are fp16 and the engine's bf16: only numbers that both hold are chosen."""

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any], stored: Callable[[Int4Matrix], Stored], *wrong: str) -> None:
        """Raise `ProfileError` with everything in the scheme that the format cannot hold, `wrong` first."""
        problems = [*wrong, *Int4Rounding.problems(scheme)]
        if scheme.name != "W4A16":
            problems.append(f"scheme.name: the format holds W4A16 (got {scheme.name!r})")
        if scheme.bits != 4:
            problems.append(f"scheme.bits: W4A16 has 4 bits (got {scheme.bits})")
        if problems:
            raise ProfileError(f"the quantizer {scheme.quantizer!r} cannot make this scheme", problems)
        rounding = Int4Rounding(scheme, half_scales=True)
        super().__init__(scheme, model_config, _Int4Layers(rounding, stored), rounding)
        self._scheme = scheme

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor that the format or vLLM's kernels cannot take: one line each, with the reason."""
        found = super().offenders(shapes)
        if f"{HEAD}.weight" in shapes and self.quantizes(f"{HEAD}.weight"):
            found.append(f"{HEAD}: readers of this format expect an output head in bf16; list {HEAD!r} under scheme.ignore")
        return found

    def _kept_modules(self, out_dir: Path) -> list[str]:
        """The linear layers besides the output head that stay in bf16."""
        modules = [name.removesuffix(".weight") for name in tensor_layout(out_dir / WEIGHTS_FILE) if name.endswith(".weight")]
        return sorted(name for name in modules if name != HEAD and is_ignored(name, self._ignore))


class AutoGptqQuantizer(_AutoQuantizer):
    """`qweight`, `qzeros`, `scales`, `g_idx` of AutoGPTQ, format version 1."""

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Raise `ProfileError` with everything in the scheme that the format cannot hold."""
        asymmetric = [] if scheme.symmetric else ["scheme.symmetric: vLLM reads symmetric weights in this format only (got false)"]
        super().__init__(scheme, model_config, gptq_v1, *asymmetric)

    def _quantization_config(self, out_dir: Path) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": self._scheme.group_size or -1,
            "sym": True,
            # With act_order too, groups are neighbours: no reader has to reorder anything.
            "desc_act": False,
            "lm_head": False,
            "dynamic": {f"-:^{re.escape(module)}$": {} for module in self._kept_modules(out_dir)},
        }


class AutoAwqQuantizer(_AutoQuantizer):
    """`qweight`, `qzeros`, `scales` of AutoAWQ, version gemm. A symmetric grid is stored as one whose zeros are all 8."""

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Raise `ProfileError` with everything in the scheme that the format cannot hold."""
        super().__init__(scheme, model_config, awq_gemm)

    def _quantization_config(self, out_dir: Path) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": self._scheme.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": [HEAD, *self._kept_modules(out_dir)],
        }
