"""The border: what an engine and a quantizer must do, and nothing more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile


class Engine(Protocol):
    """One serving runtime that holds one version of the weights.

    An engine class is constructed as `EngineClass(artifact_dir, options, weight_version)`: a folder in the
    engine's native format (see `Quantizer.scaffold`), the profile's `[engine.options]` table, and the version
    of the weights lying in the folder. An engine that can say which experts its tokens went to has an option
    `return_routes`, off by default; with it, `Generation.routes` are given.
    """

    weight_version: int

    def update(self, weights: WeightFile) -> int:
        """Swap the weights, in place or by a rebuild; atomic; drops every cache made from the old ones.

        The engine may keep the file mapped until the next update. Returns the weight_version now served.
        """
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Sample one response per prompt, in order. Equal neighbouring prompts are several draws of one prompt."""
        ...

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Teacher-forced log-probs of given response tokens, in order."""
        ...

    def close(self) -> None:
        """Give back processes and memory. Calling it twice is harmless."""
        ...


class Quantizer(Protocol):
    """High-fidelity named tensors -> one target's checkpoint format.

    A quantizer class is constructed as `QuantizerClass(scheme, model_config)`: the profile's `[scheme]` table and the
    parsed `config.json` of the model. Names on the way in are those of transformers' saved checkpoints
    (`model.layers.0.self_attn.q_proj.weight`); names on the way out are the target's own.
    """

    deterministic: bool
    """The same weights always give the same bytes."""

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor that does not fit the scheme, one line each with the reason. Empty when all fit."""
        ...

    def quantizes(self, name: str) -> bool:
        """Whether the tensor `name` is stored in fewer bits than it came with."""
        ...

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the target's tensors, holding no more than one layer. Order and shapes never change between calls."""
        ...

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The values the engine will compute with in place of `weight`: same shape and dtype as `weight`."""
        ...

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Write every engine-native file except the weights into `out_dir` (config, graph, tokenizer).

        `out_dir` already holds the first weights file, so that a graph may point into it.
        """
        ...


@runtime_checkable
class CalibratedQuantizer(Quantizer, Protocol):
    """A quantizer that can round by the inputs that layers see. Before its first calibration it rounds as if it saw none."""

    @property
    def needs_calibration(self) -> bool:
        """Whether this scheme does so; where it does not, `calibrate` changes nothing and need not be called."""
        ...

    def calibrate(self, tensors: Iterable[tuple[str, torch.Tensor]], grams: Mapping[str, torch.Tensor]) -> None:
        """Round by `grams` from now on, in `quantize` and `dequantized`: a function of the weights, `tensors` and `grams` alone.

        `tensors` are the weights of now under the names of `quantize`; `grams` is weight name -> mean of x x^T over the
        inputs x of the layer, float32 [in, in]; layers that share their inputs may share one tensor. Layers not named are
        rounded as before any calibration. Raises `WeightsError` for a matrix that is not finite.
        """
        ...


@runtime_checkable
class ActivationQuantizer(Quantizer, Protocol):
    """A quantizer whose kernels also round the inputs of the layers it quantizes."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether this scheme does so; where it does not, `rounded_inputs` gives back what it is given."""
        ...

    def rounded_inputs(self, name: str, activations: torch.Tensor) -> torch.Tensor:
        """The values that the kernels multiply with in place of the inputs [..., in] of the layer whose weight is `name`; same dtype."""
        ...


@runtime_checkable
class FileQuantizer(Quantizer, Protocol):
    """A quantizer whose target keeps its weights in one file of its own format; the weights of all others are a safetensors file."""

    weights_file: str
    """Name of that file in the artifact, e.g. `model.gguf`."""

    def write(self, path: Path, tensors: Iterable[tuple[str, torch.Tensor]], model_dir: Path) -> None:
        """Write `path` from what `quantize` streams; `model_dir` holds config and tokenizer. The file appears when it is complete."""
        ...
