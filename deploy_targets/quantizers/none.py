"""No quantization: the weights as transformers saves them, in bf16 or fp16."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_targets.errors import ProfileError
from deploy_targets.quantizers.model_files import is_tied_copy, read_config, write_model_files

if TYPE_CHECKING:
    import torch

    from deploy_targets.profile import SchemeSpec


_DTYPES = {"BF16": None, "FP16": "float16"}
"""Scheme name -> the dtype that tensors are stored in; None is the one they come with."""


class NoQuantizer:
    """Passes every tensor through under its Hugging Face name."""

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Raise `ProfileError` for a scheme that asks for something this quantizer would ignore."""
        asked = [f"scheme.{key}: {value!r} has no effect without quantization" for key, value in _quantizing_keys(scheme)]
        if scheme.name not in _DTYPES:
            asked.append(f"scheme.name: weights that are not quantized are {' or '.join(_DTYPES)} (got {scheme.name!r})")
        if asked:
            raise ProfileError("the quantizer 'none' cannot make this scheme", asked, "remove these keys or choose another quantizer")
        self._model_config = model_config
        self._dtype = _DTYPES[scheme.name]

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """No tensor can fail to fit."""
        return []

    def quantizes(self, name: str) -> bool:
        """False for every tensor."""
        return False

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors themselves, rounded in FP16; the head of a tied model is left out, the embedding stands for both.

        fp16 ends at 65,504: a larger weight becomes infinite, which no file of weights may hold.
        """
        return ((name, self._rounded(tensor)) for name, tensor in tensors if not is_tied_copy(name, self._model_config))

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight itself, rounded in FP16."""
        return self._rounded(weight).to(weight.dtype)

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Copy config, generation config and tokenizer."""
        config = read_config(model_dir)
        if self._dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = self._dtype
        write_model_files(model_dir, out_dir, config)

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._dtype is None else tensor.detach().half()


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
