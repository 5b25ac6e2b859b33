"""Checkpoints of compressed-tensors, which vLLM and transformers load unchanged; compressed_weights.py has the schemes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

from deploy_targets.errors import ProfileError
from deploy_targets.quantizers.compressed_weights import SCHEMES, Float8Weights, Int8Weights
from deploy_targets.quantizers.int4_packed import Int4Weights
from deploy_targets.quantizers.linear_quantizer import HEAD, LinearQuantizer
from deploy_targets.quantizers.model_files import is_ignored

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec


class CompressedTensorsQuantizer(LinearQuantizer):
    """The weights as one of `SCHEMES` has them."""

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Take name, `group_size` and `ignore` (absent: `lm_head`) from the scheme.

        Raises `ProfileError` with everything in the scheme that this quantizer cannot do.
        """
        made = SCHEMES.get(scheme.name)
        if made is None:
            wrong = [f"scheme.name: {' and '.join(SCHEMES)} are made here (got {scheme.name!r})"]
        else:
            wrong = made.problems(scheme)
            if scheme.bits != made.bits:
                wrong.append(f"scheme.bits: {scheme.name} has {made.bits} bits (got {scheme.bits})")
        if made is not Int4Weights:
            wrong += [f"{key}: only W4A16 has it" for key in scheme.int4_keys()]
            if not scheme.symmetric:
                wrong.append("scheme.symmetric: only W4A16 has zero points (got false)")
        if wrong or made is None:
            raise ProfileError("the quantizer 'compressed-tensors' cannot make this scheme", wrong)
        weights = made(scheme)
        super().__init__(scheme, model_config, weights, weights.rounding if isinstance(weights, Int4Weights) else None)
        self._scheme_arguments, self._format = weights.arguments(), weights.format.value

    def rounded_inputs(self, name: str, activations: torch.Tensor) -> torch.Tensor:
        """See `ActivationQuantizer`."""
        weights = self._weights
        return weights.inputs(activations) if isinstance(weights, Float8Weights | Int8Weights) else activations

    @property
    def rounds_inputs(self) -> bool:
        """Whether the scheme rounds activations, in kernels that are known to do so."""
        return isinstance(self._weights, Float8Weights | Int8Weights)

    def _quantization_config(self, out_dir: Path) -> dict[str, Any]:
        weights, activations = self._scheme_arguments
        # vLLM's output head is no Linear: it is quantized when a target names it.
        targets = ["Linear"] if is_ignored(HEAD, self._ignore) else ["Linear", HEAD]
        scheme = QuantizationScheme(targets=targets, weights=weights, input_activations=activations, format=self._format)
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=list(self._ignore),
            format=self._format,
            quantization_status=QuantizationStatus.COMPRESSED,
        )
        # Through JSON, so that enums become the strings that readers expect.
        return {"quant_method": "compressed-tensors", **config.model_dump(mode="json", exclude_none=True)}
