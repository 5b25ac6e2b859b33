"""No quantization: the weights as transformers saves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_targets.errors import ProfileError
from deploy_targets.quantizers.model_files import is_tied_copy, read_config, write_model_files

if TYPE_CHECKING:
    import torch

    from deploy_targets.profile import SchemeSpec


class NoQuantizer:
    """Passes every tensor through under its Hugging Face name, in the dtype it comes with."""

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Raise `ProfileError` for a scheme that asks for something this quantizer would ignore."""
        asked = [f"scheme.{key}: {value!r} has no effect without quantization" for key, value in _quantizing_keys(scheme)]
        if scheme.name != "BF16":
            asked.append(f"scheme.name: weights that are not quantized are BF16 (got {scheme.name!r})")
        if asked:
            raise ProfileError("the quantizer 'none' cannot make this scheme", asked, "remove these keys or choose another quantizer")
        self._model_config = model_config

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """No tensor can fail to fit."""
        return []

    def quantizes(self, name: str) -> bool:
        """False for every tensor."""
        return False

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors themselves; the head of a tied model is left out, the embedding stands for both."""
        return ((name, tensor) for name, tensor in tensors if not is_tied_copy(name, self._model_config))

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight itself."""
        return weight

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Copy config, generation config and tokenizer."""
        write_model_files(model_dir, out_dir, read_config(model_dir))


def _quantizing_keys(scheme: SchemeSpec) -> list[tuple[str, object]]:
    asked: list[tuple[str, object]] = []
    if scheme.bits != 16:
        asked.append(("bits", scheme.bits))
    if scheme.group_size is not None:
        asked.append(("group_size", scheme.group_size))
    if not scheme.symmetric:
        asked.append(("symmetric", scheme.symmetric))
    if scheme.ignore is not None:
        asked.append(("ignore", scheme.ignore))
    return asked
