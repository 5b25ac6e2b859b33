"""Weights of 4 or 8 bits for ONNX Runtime's MatMulNBits, in the graph that onnxruntime-genai's model builder makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_targets.errors import PreflightError
from deploy_targets.quantizers.model_files import is_ignored, unmatched_ignores
from deploy_targets.quantizers.onnx_blocks import BITS, GROUP_SIZES, dequantize_blocks, pack_blocks, quantize_blocks
from deploy_targets.quantizers.onnx_places import HEAD, QKV, GraphPlaces, float_initializer, to_float

if TYPE_CHECKING:
    import torch

    from deploy_targets.profile import SchemeSpec

ACCURACY_LEVELS = {"W4A8": 4, "W4A16": 1, "W8A8": 4, "W8A16": 1}
"""Scheme name -> MatMulNBits `accuracy_level` on the CPU: 4 rounds activations to int8 per block (the builder's default),
1 computes in float32 as a weight-only scheme promises. CUDA's kernels round no activations and know no level."""


class OnnxMatMulNBitsQuantizer:
    """Checkpoint tensors -> the initializers of the builder's graph for `-p int4` and `-p int8`.

    For `scheme.provider` cpu everything that is not quantized is float32, for cuda float16, scales included. A tied output
    head of 4 bits is quantized, and embeddings are read from it; one of 8 bits is kept in floating point unless `scheme.ignore`
    says otherwise, which is refused: the builder has no embedding of 8 bits, and head and embedding would differ.
    """

    deterministic = True

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Raises `PreflightError` for a scheme or a model family that has no such graph."""
        self.scheme = scheme
        self.places = GraphPlaces(model_config)
        self.provider = scheme.provider or "cpu"
        self.group_size = scheme.group_size or 0
        absent = (HEAD,) if scheme.bits == 8 and self.places.tied else ()
        self._ignore = absent if scheme.ignore is None else scheme.ignore
        problems = list(self.places.problems)
        rounds = () if self.provider == "cuda" else ("A8",)
        names = [f"W{scheme.bits}{activations}" for activations in (*rounds, "A16")]
        if scheme.bits not in BITS:
            problems.append(f"scheme.bits must be 4 or 8, got {scheme.bits}")
        elif scheme.name not in names:
            problems.append(f"scheme.name {scheme.name!r} is not one of {', '.join(names)} ({scheme.bits} bits on {self.provider})")
        if self.group_size not in GROUP_SIZES:
            problems.append(f"scheme.group_size must be one of {GROUP_SIZES}, got {scheme.group_size}")
        if not scheme.symmetric:
            problems.append("scheme.symmetric must be true")
        if scheme.bits == 8 and self.places.tied and not self._ignored(HEAD):
            problems.append(f"scheme.ignore must name {HEAD!r}: the embedding shares its matrix, and the graph has no embedding of 8 bits")
        if problems:
            raise PreflightError("a MatMulNBits target cannot hold this model", problems)

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor without a place in the graph, with an input size that the groups do not divide, or taken for the head."""
        lines = [
            f"{name}: input size {shape[-1]} is not a multiple of group_size {self.group_size}"
            for name, shape in shapes.items()
            if self.quantizes(name) and shape[-1] % self.group_size
        ]
        lines += self.places.offenders(shapes)
        found = [self.places.find(name) for name in shapes]
        lines += unmatched_ignores(self._ignore, {place.module for place in found if place is not None})
        for layer in range(self.places.num_layers):
            parts = [f"model.layers.{layer}.self_attn.{part}" for part in QKV]
            kept = [part for part in parts if self._ignored(part)]
            if kept and len(kept) < len(parts):
                reason = "q, k and v are one packed matrix; ignore all three or none"
                lines.append(f"model.layers.{layer}.self_attn: {reason}, not {', '.join(kept)}")
        return lines

    def quantizes(self, name: str) -> bool:
        """Whether the tensor `name` is stored in 4 or 8 bits; a tied embedding is when the head is."""
        place = self.places.find(name)
        return place is not None and place.kind == "linear" and not self._ignored(place.module)

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the graph's initializers, holding no more than one layer.

        Quantized: `*.MatMul.weight_Q{bits}` uint8 [N, K / g, g * bits / 8] and `*.MatMul.weight_scales` [N, K / g] for groups
        of g inputs. Scales and all else are float32, or float16 for cuda. Raises `WeightsError` for a tensor without a place in
        the graph, for packed parts that never arrive, and for values that float16 cannot hold.
        """
        for place, name, whole in self.places.gather(tensors):
            if self.quantizes(name):
                codes, scales = quantize_blocks(to_float(name, whole, self._dtype), self.group_size, self.scheme.bits)
                yield f"{place.target}.MatMul.weight_Q{self.scheme.bits}", pack_blocks(codes, self.scheme.bits)
                yield f"{place.target}.MatMul.weight_scales", scales
            else:
                yield float_initializer(place, name, whole, self._dtype)

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The values MatMulNBits computes with in place of `weight` [N, K], rounded to `weight`'s dtype."""
        if not self.quantizes(name):
            return weight
        codes, scales = quantize_blocks(weight.to(self._dtype), self.group_size, self.scheme.bits)
        return dequantize_blocks(codes, scales, self.scheme.bits, weight.dtype)

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Write graph, genai config and tokenizer into `out_dir`; every weight of the graph points into its `model.safetensors`.

        Raises `MissingPackageError` without the extra `onnx-export`, `EngineError` when the builder fails or its graph
        does not match the weights file.
        """
        from deploy_targets.quantizers.onnx_scaffold import BlockOptions, GraphSpec, scaffold

        accuracy_level = ACCURACY_LEVELS[self.scheme.name] if self.provider == "cpu" else 0
        blocks = BlockOptions(self.scheme.bits, self.group_size, accuracy_level, tuple(self.places.nodes(self._ignored)))
        spec = GraphSpec("float32" if self.provider == "cpu" else "float16", self.provider, blocks)
        scaffold(Path(model_dir), Path(out_dir), spec)

    @property
    def _dtype(self) -> torch.dtype:
        """What scales and tensors that are not quantized are stored as."""
        import torch

        return torch.float32 if self.provider == "cpu" else torch.float16

    def _ignored(self, module: str) -> bool:
        return is_ignored(module, self._ignore)
