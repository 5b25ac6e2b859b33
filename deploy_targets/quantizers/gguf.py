"""GGUF files for llama.cpp: Q4_K_M, Q3_K_S, Q2_K, Q4_0, Q8_0, F16, F32, byte for byte what `llama-quantize` makes of the same weights.

The weights of the artifact are one `model.gguf` that llama.cpp and everything built on it open unchanged, tokenizer included
where llama.cpp has its equal (`gguf_metadata`). Where a row is no multiple of the 256 values of a K-quant block, llama.cpp's
own fallbacks apply: Q4_0 in place of Q2_K and Q3_K, Q5_0 in place of Q4_K, Q8_0 in place of Q6_K, and F16 for rows that are no
multiple of 32 either.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from deploy_targets.errors import PreflightError, WeightsError
from deploy_targets.gguf_file import ALIGNMENT, GGUF_FILE
from deploy_targets.quantizers import ggml
from deploy_targets.quantizers.gguf_metadata import add_metadata, new_writer
from deploy_targets.quantizers.gguf_plan import ROPE_FACTORS, SCHEMES, Place, config_problems, head_dim, plan_of, rope_parameters
from deploy_targets.quantizers.model_files import is_tied_copy, read_config, write_model_files

if TYPE_CHECKING:
    import torch

    from deploy_targets.profile import SchemeSpec

_EXPECTED = {
    "Q4_K_M": (4, 32, False), "Q3_K_S": (3, 16, True), "Q2_K": (2, 16, False), "Q4_0": (4, 32, True), "Q8_0": (8, 32, True),
    "F16": (16, None, True), "F32": (32, None, True),
}  # fmt: skip
"""scheme.name -> bits, group_size, symmetric of most of its weights; the groups of K-quants share a block of 256."""


class GgufQuantizer:
    """Checkpoint tensors -> the tensors of a GGUF file, quantized by llama.cpp's own code."""

    deterministic = True
    weights_file = GGUF_FILE

    def __init__(self, scheme: SchemeSpec, model_config: Mapping[str, Any]) -> None:
        """Raises `PreflightError` for a scheme or a model that GGUF targets do not have."""
        problems = config_problems(model_config)
        expected = _EXPECTED.get(scheme.name)
        given = (scheme.bits, scheme.group_size, scheme.symmetric)
        if expected is None:
            problems.append(f"scheme.name {scheme.name!r} is not one of {', '.join(SCHEMES)}")
        elif given != expected:
            problems.append(f"scheme: {scheme.name} has (bits, group_size, symmetric) = {expected}, not {given}")
        if scheme.ignore:
            problems.append(f"scheme.ignore: {scheme.name} is llama.cpp's own mix of types; leave `ignore` out")
        if problems:
            raise PreflightError("the GGUF target cannot hold this model", problems)
        self.scheme = scheme
        self._config = model_config
        self._plan = plan_of(model_config, scheme.name)
        self._encoded: dict[str, tuple[bytes, NDArray[np.uint8]]] = {}

    def offenders(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Every tensor without a place in the file, of another shape than `config.json` says, or missing."""
        lines = []
        for name, shape in shapes.items():
            if is_tied_copy(name, self._config):
                continue
            place = self._plan.get(name)
            if place is None:
                lines.append(f"{name}: a GGUF file of a {self._config['model_type']} model has no place for this tensor")
            elif place.shape != tuple(shape):
                lines.append(f"{name}: shape {list(shape)}, config.json implies {list(place.shape)}")
        return lines + [f"{name}: is missing" for name in self._plan if name not in shapes and name != ROPE_FACTORS]

    def quantizes(self, name: str) -> bool:
        """Whether the tensor is stored as anything but float32; embeddings and the head are, norms and biases are not."""
        return name in self._plan and self._plan[name].type != Type.F32

    def stored_type(self, name: str) -> str:
        """The ggml type under which the checkpoint's tensor `name` is stored, e.g. `Q6_K`."""
        return str(self._plan[name].type.name)

    def quantize(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Stream the file's tensors under their GGUF names: uint8 [rows, bytes of a row], or float32 where nothing is quantized.

        Raises `WeightsError` for a tensor without a place, of the wrong shape, non-finite, or one that never arrives.
        """
        import torch

        missing = dict.fromkeys(name for name in self._plan if name != ROPE_FACTORS)
        for name, tensor in tensors:
            if is_tied_copy(name, self._config):
                continue  # the same matrix as the embedding, which some learners list twice
            place = self._plan.get(name)
            if place is None or place.shape != tuple(tensor.shape):
                expected = "no such tensor" if place is None else f"shape {list(place.shape)}"
                raise WeightsError(f"tensor {name!r} of shape {list(tensor.shape)}: the GGUF file has {expected}")
            missing.pop(name, None)
            data = self._bytes(place, tensor)
            if place.num_heads:
                data = _interleaved(data, place.num_heads)
            yield place.name, torch.from_numpy(data.view(np.float32) if place.type == Type.F32 else data)
        if missing:
            raise WeightsError(f"these tensors never arrived: {', '.join(missing)}")
        if ROPE_FACTORS in self._plan:
            yield ROPE_FACTORS, torch.from_numpy(_llama3_factors(self._config))

    def dequantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The values that the file's bytes stand for, in `weight`'s shape and dtype.

        llama.cpp multiplies these with activations that it rounds to 8 bits, in blocks of 32 or 256, as it goes.
        """
        import torch

        if not self.quantizes(name):
            return weight
        place = self._plan[name]
        return torch.from_numpy(ggml.decode(self._bytes(place, weight), place.type)).to(weight.device, weight.dtype)

    def write(self, path: Path, tensors: Iterable[tuple[str, torch.Tensor]], model_dir: Path) -> None:
        """Write the GGUF file `path` from what `quantize` streams and the metadata of `model_dir`; it appears when it is complete.

        Raises what `quantize` raises, and `ArtifactError` for a tokenizer that cannot be read.
        """
        temporary = path.with_name(path.name + ".partial")
        places = {place.name: place for place in self._plan.values()}
        try:
            writer = new_writer(self._config)
            add_metadata(writer, self._config, SCHEMES[self.scheme.name][0], model_dir)
            for place in places.values():
                writer.add_tensor_info(place.name, place.shape, np.dtype(np.float32), place.num_bytes, place.type)
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            last = list(places.values())[-1]
            with open(temporary, "r+b") as file:
                base = _aligned(file.seek(0, os.SEEK_END))
                file.truncate(base + _aligned(last.offset + last.num_bytes))
                for name, tensor in self._checked(tensors):
                    file.seek(base + places[name].offset)
                    file.write(tensor.numpy().data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def scaffold(self, model_dir: Path, out_dir: Path) -> None:
        """Copy config, generation config and tokenizer; llama.cpp needs none of them, this project's engine and rewards do."""
        write_model_files(model_dir, out_dir, read_config(model_dir))

    def _bytes(self, place: Place, tensor: torch.Tensor) -> NDArray[np.uint8]:
        """The bytes of a tensor, rows in the order of the checkpoint.

        K-quants search for their scales, at some 10 million weights per second and core, and a step asks twice for the same
        weights, once to publish and once for the learner's twin: the last bytes of each tensor are kept.
        """
        import torch

        values = ggml.to_numpy(tensor)
        if place.type == Type.F32:
            return ggml.encode(place.source, values, place.type)
        digest = hashlib.sha256(values.data).digest()
        known = self._encoded.get(place.source)
        if known is None or known[0] != digest:
            known = self._encoded[place.source] = digest, ggml.encode(place.source, values, place.type, torch.get_num_threads())
        return known[1]

    def _checked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        sizes = {place.name: place.num_bytes for place in self._plan.values()}
        for name, tensor in tensors:
            assert sizes.pop(name) == tensor.numel() * tensor.element_size(), f"{name} does not fill its place"
            yield name, tensor
        assert not sizes, f"never streamed: {sorted(sizes)}"


def _interleaved(rows: NDArray[np.uint8], num_heads: int) -> NDArray[np.uint8]:
    """Rows of each head in the order that llama.cpp's rotary embedding wants for the architecture llama: 0, d/2, 1, d/2 + 1, ...

    Hugging Face pairs value i with i + d/2, llama.cpp pairs neighbours there (`permute` in its conversion/llama.py).
    """
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _llama3_factors(config: Mapping[str, Any]) -> NDArray[np.float32]:
    """By what each frequency is divided under the rotary embedding `llama3`, float32 [head_dim / 2] (conversion/llama.py)."""
    _, rope = rope_parameters(config)
    size = head_dim(config)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < length / high, 1.0, np.where(waves > length / low, factor, between)).astype(np.float32)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
