"""Float32 or float16 weights in the graph that onnxruntime-genai's model builder makes: no quantization."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_targets.errors import PreflightError
from deploy_targets.quantizers.onnx_places import GraphPlaces, float_initializer, to_float

if TYPE_CHECKING:
    import torch

    from deploy_targets.profile import SchemeSpec

PRECISIONS = {"FP32": 32, "FP16": 16}
"""Scheme name -> bits of weights, activations and key-value cache."""


class OnnxFloatQuantizer:
    """Checkpoint tensors -> the initializers of the builder's graph for `-p fp32` and `-p fp16`.

    Every tensor, a bf16 one too, is held exactly, but for magnitudes below float16's normal range.
    """

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Raises `PreflightError` for a scheme or a model family that has no such graph."""
        self.places = GraphPlaces(model_config)
        self.bits = scheme.bits
        self.provider = scheme.provider or "cpu"
        problems = list(self.places.problems)
        if PRECISIONS.get(scheme.name) != scheme.bits:
            known = " or ".join(f"{name} with scheme.bits {bits}" for name, bits in PRECISIONS.items())
            problems.append(f"scheme.name must be {known}, got {scheme.name} with {scheme.bits}")
        if scheme.group_size is not None or not scheme.symmetric or scheme.ignore:
            problems.append("scheme.group_size, scheme.symmetric and scheme.ignore belong to quantized weights; leave them out")
        if self.provider == "cuda" and scheme.bits == 32:
            # The builder (0.18) writes a graph that onnxruntime cannot load; CUDA's GroupQueryAttention knows float16 alone.
            problems.append("scheme.provider 'cuda' has no attention in float32; take the scheme FP16")
        if problems:
            raise PreflightError("a floating-point ONNX target cannot hold this model", problems)

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor without a place in the graph, or that the builder would take for the output head."""
        return self.places.offenders(shapes)

    def quantizes(self, name: str) -> bool:
        """Nothing is: bf16 weights come with no more bits than they are stored in."""
        return False

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the graph's initializers, matrices transposed to [K, N], holding no more than one layer.

        Raises `WeightsError` for a tensor without a place in the graph, for packed parts that never arrive, and for values
        that float16 cannot hold.
        """
        for place, name, whole in self.places.gather(tensors):
            yield float_initializer(place, name, whole, self._dtype)

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as the graph holds it, in `weight`'s dtype."""
        return to_float(name, weight, self._dtype).to(weight.dtype)

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Write graph, genai config and tokenizer into `out_dir`; every weight of the graph points into its `model.safetensors`.

        Raises `MissingPackageError` without the extra `onnx-export`, `EngineError` when the builder fails or its graph
        does not match the weights file.
        """
        from deploy_targets.quantizers.onnx_scaffold import GraphSpec, scaffold

        scaffold(Path(model_dir), Path(out_dir), GraphSpec("float32" if self.bits == 32 else "float16", self.provider))

    @property
    def _dtype(self) -> torch.dtype:
        import torch

        return torch.float32 if self.bits == 32 else torch.float16
