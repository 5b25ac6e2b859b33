"""Weights as int8 with one float32 scale a row, and an engine that gives them to transformers as the floats they stand for."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from deploy_targets.engines.requests import check_layout, read_layout
from deploy_targets.engines.transformers import TransformersEngine
from deploy_targets.errors import ProfileError
from deploy_targets.profile import SchemeSpec
from deploy_targets.quantizers.model_files import is_tied_copy, read_config, write_model_files
from deploy_targets.types import WEIGHTS_FILE, Generation, Sampling, TokenScores, TokenSequence, WeightFile
from deploy_targets.weights_file import write_weights

SCALE, TYPE_PREFIX = "_scale", "int8-rows-"


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [rows, columns] and float32 [rows, 1]: the largest value of a row becomes 127."""
    scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
    return (weight.float() / scale).round().to(torch.int8), scale


class Int8RowsQuantizer:
    """Rounds the layers of the blocks; embedding, head and norms stay bf16. What each method owes: deploy_targets/protocols.py."""

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        if scheme != SchemeSpec(quantizer=scheme.quantizer, name="W8A16", bits=8):
            raise ProfileError("int8-rows cannot make this scheme", [str(scheme)], "give it name = 'W8A16', bits = 8 and nothing else")
        self._model_config = model_config

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        wrong = {name: shape for name, shape in shapes.items() if self.quantizes(name) and len(shape) != 2}
        return [f"{name} {list(shape)}: only matrices have rows" for name, shape in wrong.items()]

    def quantizes(self, name: str) -> bool:
        return name.endswith("_proj.weight")

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if self.quantizes(name):
                values, scale = encode(tensor)
                yield from ((name, values), (name + SCALE, scale))
            elif not is_tied_copy(name, self._model_config):
                yield name, tensor.to(torch.bfloat16)

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if not self.quantizes(name):
            return weight
        values, scale = encode(weight)
        return (values * scale).to(weight.dtype)

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        config = read_config(model_dir)
        # Other readers stop at the unknown type, where they would take the int8 values for the weights.
        write_model_files(model_dir, out_dir, config | {"model_type": TYPE_PREFIX + config["model_type"]})


class Int8RowsEngine:
    """Keeps the weights as floats in a folder of its own, which transformers runs; `options` are those of its engine."""

    def __init__(self, artifact_dir: Path, options: Mapping[str, Any], weight_version: int) -> None:
        self._layout = read_layout(artifact_dir / WEIGHTS_FILE)
        self._folder = tempfile.TemporaryDirectory(prefix="int8-rows-")
        config = read_config(artifact_dir)
        config["model_type"] = config["model_type"].removeprefix(TYPE_PREFIX)
        write_model_files(artifact_dir, Path(self._folder.name), config)
        self._engine = TransformersEngine(self._as_floats(artifact_dir / WEIGHTS_FILE).parent, options, weight_version)
        self.weight_version = weight_version

    def _as_floats(self, path: Path) -> Path:
        stored, floats = load_file(path), Path(self._folder.name) / WEIGHTS_FILE
        values = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
        tensors = ((name, value * stored[name + SCALE] if name + SCALE in stored else value) for name, value in values.items())
        write_weights(floats, tensors, num_tensors_max=len(values))
        return floats

    def update(self, weights: WeightFile) -> int:
        check_layout(self._layout, weights.path)
        self.weight_version = self._engine.update(WeightFile(self._as_floats(weights.path), weights.weight_version))
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        return self._engine.generate(prompts, sampling)

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        return self._engine.score(sequences, temperature)

    def close(self) -> None:
        self._engine.close()
        self._folder.cleanup()
