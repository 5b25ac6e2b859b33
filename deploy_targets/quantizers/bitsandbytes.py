"""Checkpoints of bitsandbytes, which transformers loads unchanged; bitsandbytes_weights.py has the schemes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deploy_targets.errors import ProfileError
from deploy_targets.quantizers.bitsandbytes_weights import SCHEMES
from deploy_targets.quantizers.linear_layers import Structure, model_structure
from deploy_targets.quantizers.model_files import is_ignored, is_tied_copy, read_config, unmatched_ignores, write_model_files

if TYPE_CHECKING:
    from deploy_targets.profile import SchemeSpec

_HEAD = "lm_head"


class BitsAndBytesQuantizer:
    """One of `SCHEMES` for every linear layer that `scheme.ignore` does not keep in bf16."""

    deterministic = True

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
        if not scheme.symmetric:
            wrong.append("scheme.symmetric: bitsandbytes has no zero points (got false)")
        if wrong or made is None:
            raise ProfileError("the quantizer 'bitsandbytes' cannot make this scheme", wrong)
        self._weights = made(scheme)
        self._model_config = model_config
        self._asked_ignore = scheme.ignore or ()
        self._ignore = (_HEAD,) if scheme.ignore is None else scheme.ignore

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor that the format or transformers cannot take, and every `ignore` without effect: one line each, with the reason."""
        tied = is_tied_copy(f"{_HEAD}.weight", self._model_config)
        found = unmatched_ignores(self._asked_ignore, [*(name.rpartition(".")[0] for name in shapes), *([_HEAD] if tied else [])])
        if tied and not is_ignored(_HEAD, self._ignore):
            found.append(f"{_HEAD}: it is the embedding, which is not quantized; list {_HEAD!r} under scheme.ignore, or leave the key out")
        try:
            structure = model_structure(self._model_config)
        except ValueError as error:
            return [*found, str(error)]
        renamed = [name for name in shapes if name not in structure.tensors]
        if renamed:
            # Mixtures of experts end here: transformers fuses the experts while loading, and no layer of bitsandbytes holds them.
            found.append(
                f"{_some(renamed)}: transformers renames or fuses {len(renamed)} tensors of this model family while loading, so that they "
                "cannot be quantized one by one; choose a family that is stored as it is run"
            )
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if not self.quantizes(name) or name not in structure.tensors or is_tied_copy(name, self._model_config):
                continue
            if module not in structure.linears:
                found.append(f"{name} {list(shape)}: transformers does not run it as a linear layer; add {module!r} to scheme.ignore")
                continue
            found += [f"{name} {list(shape)}: {problem}" for problem in self._weights.shape_problems(shape)]
        return found

    def quantizes(self, name: str) -> bool:
        """Whether `name` is the weight of a linear layer that `scheme.ignore` does not keep in high precision."""
        if not name.endswith(".weight"):
            return False
        module = name.removesuffix(".weight")
        last = module.rpartition(".")[2]
        return "norm" not in last and "embed" not in last and not is_ignored(module, self._ignore)

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights as their scheme stores them; other tensors as bf16 under their own names."""
        for name, tensor in tensors:
            if is_tied_copy(name, self._model_config):
                continue
            if self.quantizes(name):
                yield from self._weights.encode(name, tensor)
            else:
                yield name, tensor.detach().to(torch.bfloat16)

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The matrix that the layers multiply with."""
        return self._weights.decode(weight) if self.quantizes(name) else weight

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Write `config.json` with its `quantization_config`, and copy tokenizer and generation config."""
        from transformers import BitsAndBytesConfig

        config = read_config(model_dir)
        asked = BitsAndBytesConfig(**self._weights.arguments(), llm_int8_skip_modules=self._kept(model_structure(config)))
        config["quantization_config"] = asked.to_dict()
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
        write_model_files(model_dir, out_dir, config)

    def _kept(self, structure: Structure) -> list[str]:
        """The linear layers that stay in bf16, by name: what transformers has to skip."""
        return sorted(name for name in structure.linears if not self.quantizes(f"{name}.weight"))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
