"""The weights of an artifact as numbers, whatever its format: numpy alone, some rows at a time, under the learner's names.

Each format stores a matrix [out, in] its own way (`quantizers/` writes them); here they are read back without that code, so that a
fault in one does not hide in the other. `storage` says in which form a tensor was found: `BF16`, `U4 in groups of 32`, `Q4_0`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy_targets.errors import ArtifactError
from deploy_targets.gguf_file import BLOCKS, GGUF_FILE, read_gguf
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import tensor_layout

Values = NDArray[np.float32]
VALUES_AT_ONCE = 1 << 22
_ROWS = 64
"""Rows are read in multiples of this: some formats pack eight rows to a word."""
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1",
}  # fmt: skip
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word holds each of eight neighbours."""
_PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight", "qweight", "qzeros", "scales", "g_idx", "SCB",
    "weight_format", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "bias",
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the learner as an artifact holds it; `rows(slice)` are some of its rows, float32."""

    shape: tuple[int, ...]
    storage: str
    rows: Callable[[slice], Values]

    def blocks(self) -> Iterator[Values]:
        """All rows, some at a time; where they are cut depends on the shape alone."""
        for part in row_blocks(self.shape):
            yield self.rows(part)

    def whole(self) -> Values:
        """All rows."""
        return np.concatenate(list(self.blocks())).reshape(self.shape)


@dataclass(frozen=True)
class StoredWeights:
    """Learner's name -> tensor of everything that was found, and the names in the file that belong to none of these."""

    tensors: Mapping[str, StoredTensor]
    unknown: tuple[str, ...]


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dimension of about `VALUES_AT_ONCE` values."""
    num_rows = shape[0] if shape else 1
    step = max(_ROWS, VALUES_AT_ONCE // max(1, math.prod(shape[1:])) // _ROWS * _ROWS)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def read_stored(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], scheme: str) -> StoredWeights:
    """The weights of the artifact in `folder`, of a model with the learner's `config` (config.json) and tensors of `shapes`.

    `scheme`: its name, by which GGUF files choose their types. Raises `ArtifactError` for a file that does not parse.
    """
    try:
        if (folder / GGUF_FILE).is_file():
            return _read_gguf(folder / GGUF_FILE, config, scheme)
        file = _File(folder / WEIGHTS_FILE)
        if (folder / "model.onnx").is_file():
            return _read_onnx(file, config, shapes)
        return _read_checkpoint(file, _quantization(folder))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"the weights in {folder} cannot be read: {type(error).__name__}: {error}") from error


class _File:
    """A mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        self.layout = tensor_layout(path)
        self._data = np.memmap(path, np.uint8, "r")

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as it lies there; bf16 as uint16."""
        dtype, shape, offset, length = self.layout[name]
        return self._data[offset : offset + length].view(_NUMPY[dtype]).reshape(shape)

    def plain(self, name: str) -> StoredTensor:
        """A tensor of floats, or of float8 without its scale."""
        dtype, shape, _, _ = self.layout[name]
        return StoredTensor(shape, dtype, partial(_plain_rows, self.raw(name), dtype))


def _plain_rows(raw: NDArray[Any], dtype: str, rows: slice) -> Values:
    part = raw[rows] if raw.ndim else raw
    values: Values
    if dtype == "BF16":
        values = (part.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F8_E4M3":
        values = _float8_values()[part]
    else:
        values = part.astype(np.float32)
    return values


@cache
def _float8_values() -> Values:
    """The 256 values of e4m3 without infinities: 1 sign, 4 exponent (bias 7), 3 mantissa bits; all ones is NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -values, values).astype(np.float32)


def _nibbles(words: NDArray[Any]) -> NDArray[np.uint8]:
    """int32 [..., n] -> uint8 [..., 8 n], lowest bits first."""
    data = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*words.shape[:-1], -1)


def _grouped(values: NDArray[Any], scales: Values, zeros: NDArray[Any] | float) -> Values:
    """(value - zero) * scale of values [out, in] and scales, zeros [out, groups]."""
    out, num_inputs = values.shape
    grouped = values.reshape(out, scales.shape[1], num_inputs // scales.shape[1]).astype(np.float32)
    offsets = zeros[..., None].astype(np.float32) if isinstance(zeros, np.ndarray) else np.float32(zeros)
    return ((grouped - offsets) * scales[..., None]).reshape(out, num_inputs)


def _quantization(folder: Path) -> Mapping[str, Any]:
    config = json.loads((folder / "config.json").read_text("utf-8")) if (folder / "config.json").is_file() else {}
    found: Mapping[str, Any] = config.get("quantization_config") or {}
    return found


def _read_checkpoint(file: _File, quantization: Mapping[str, Any]) -> StoredWeights:
    """Checkpoints of Hugging Face: plain, compressed-tensors, AutoGPTQ, AutoAWQ, bitsandbytes."""
    modules: dict[str, set[str]] = {}
    tensors: dict[str, StoredTensor] = {}
    unknown = []
    for name in file.layout:
        part = next((part for part in _PARTS if name.endswith(f".{part}")), None)
        if part is None:
            unknown.append(name)
        elif part == "bias":
            tensors[name] = file.plain(name)
        else:
            modules.setdefault(name.removesuffix(f".{part}"), set()).add(part)
    for module, parts in modules.items():
        name = f"{module}.weight"
        if "weight_packed" in parts:
            tensors[name] = _packed(file, module, parts)
        elif "qweight" in parts:
            tensors[name] = (_awq if quantization.get("quant_method") == "awq" else _gptq)(file, module)
        elif "weight.quant_map" in parts:
            tensors[name] = _nf4(file, name)
        elif "SCB" in parts:
            tensors[name] = _scaled(file, name, _floats(file, f"{module}.SCB")[:, None] / np.float32(127))
        elif "weight" in parts:
            scale = f"{module}.weight_scale"
            tensors[name] = _scaled(file, name, _floats(file, scale)) if "weight_scale" in parts else file.plain(name)
        else:
            unknown += [f"{module}.{part}" for part in sorted(parts)]
    return StoredWeights(tensors, tuple(unknown))


def _floats(file: _File, name: str) -> Values:
    return file.plain(name).whole()


def _packed(file: _File, module: str, parts: set[str]) -> StoredTensor:
    words, scales = file.raw(f"{module}.weight_packed"), _floats(file, f"{module}.weight_scale")
    out, num_inputs = words.shape[0], words.shape[1] * 8
    zeros: NDArray[Any] | None = None
    if "weight_zero_point" in parts:
        zeros = _nibbles(file.raw(f"{module}.weight_zero_point").T).T

    def rows(part: slice) -> Values:
        return _grouped(_nibbles(words[part]), scales[part], 8.0 if zeros is None else zeros[part])

    return StoredTensor((out, num_inputs), _groups("U4", num_inputs, scales), rows)


def _gptq(file: _File, module: str) -> StoredTensor:
    words, scales = file.raw(f"{module}.qweight"), _floats(file, f"{module}.scales").T
    zeros = (_nibbles(file.raw(f"{module}.qzeros")) + 1).T
    group_of = file.raw(f"{module}.g_idx") if f"{module}.g_idx" in file.layout else None
    num_inputs, out = words.shape[0] * 8, words.shape[1]

    def rows(part: slice) -> Values:
        values = _nibbles(words[:, part].T)
        if group_of is None:
            return _grouped(values, scales[part], zeros[part])
        return (values.astype(np.float32) - zeros[part][:, group_of]) * scales[part][:, group_of]

    return StoredTensor((out, num_inputs), _groups("U4", num_inputs, scales), rows)


def _awq(file: _File, module: str) -> StoredTensor:
    words, scales = file.raw(f"{module}.qweight"), _floats(file, f"{module}.scales").T
    zeros = _awq_nibbles(file.raw(f"{module}.qzeros")).T
    num_inputs, out = words.shape[0], words.shape[1] * 8

    def rows(part: slice) -> Values:
        columns = words[:, part.start // 8 : -(-part.stop // 8)]
        return _grouped(_awq_nibbles(columns).T, scales[part], zeros[part])

    return StoredTensor((out, num_inputs), _groups("U4", num_inputs, scales), rows)


def _awq_nibbles(words: NDArray[Any]) -> NDArray[np.uint8]:
    eights = _nibbles(words).reshape(len(words), -1, 8)
    return eights[..., _AWQ_PLACES].reshape(len(words), -1)


def _nf4(file: _File, name: str) -> StoredTensor:
    state = json.loads(file.raw(f"{name}.quant_state.bitsandbytes__nf4").tobytes())
    out, num_inputs = state["shape"]
    codes = file.raw(name).reshape(out, num_inputs // 2)
    table = file.raw(f"{name}.quant_map").astype(np.float32)
    absmax = file.raw(f"{name}.absmax").astype(np.float32).reshape(out, -1)

    def rows(part: slice) -> Values:
        data = codes[part]
        values = table[np.stack([data >> 4, data & 15], axis=-1).reshape(len(data), -1)]
        return _grouped(values, absmax[part], 0.0)

    return StoredTensor((out, num_inputs), f"NF4 in blocks of {state['blocksize']}", rows)


def _scaled(file: _File, name: str, scales: Values) -> StoredTensor:
    """FP8 or INT8 with a scale per row [out, 1] or per block [out / b, in / b]."""
    plain = file.plain(name)
    out, num_inputs = plain.shape
    down, across = out // scales.shape[0], num_inputs // scales.shape[1]

    def rows(part: slice) -> Values:
        of_rows = scales[np.arange(part.start, part.stop) // down]
        values: Values = plain.rows(part) * (of_rows if across == num_inputs else np.repeat(of_rows, across, axis=1))
        return values

    per = "row" if across == num_inputs else f"block of {down} x {across}"
    return StoredTensor(plain.shape, f"{plain.storage} with a scale per {per}", rows)


def _groups(what: str, num_inputs: int, scales: Values) -> str:
    return f"{what} in groups of {num_inputs // scales.shape[1]}"


def _read_onnx(file: _File, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> StoredWeights:
    """The initializers of onnxruntime-genai's graph, packed parts apart again."""
    from deploy_targets.quantizers.onnx_places import GraphPlaces

    places = GraphPlaces(config)
    tensors: dict[str, StoredTensor] = {}
    used: set[str] = set()
    begins: dict[str, int] = {}
    for name, shape in sorted(shapes.items(), key=lambda item: place.part if (place := places.find(item[0])) else 0):
        place = places.find(name)
        if place is None:
            continue
        begin = begins.get(place.target, 0)
        begins[place.target] = begin + shape[0]
        stored, names = _initializer(file, place.target, shape)
        used |= set(names)
        if stored is not None:
            tensors[name] = _some_rows(stored, begin, shape)
    return StoredWeights({name: tensors[name] for name in shapes if name in tensors}, tuple(sorted(set(file.layout) - used)))


def _initializer(file: _File, target: str, shape: tuple[int, ...]) -> tuple[StoredTensor | None, list[str]]:
    """What holds `target`, and the names it has in the file."""
    for bits in (4, 8):
        codes_name, scales_name = f"{target}.MatMul.weight_Q{bits}", f"{target}.MatMul.weight_scales"
        if codes_name in file.layout and scales_name in file.layout:
            return _blockwise(file.raw(codes_name), _floats(file, scales_name), bits), [codes_name, scales_name]
    transposed = f"{target}.MatMul.weight"
    if transposed in file.layout:
        dtype, (num_inputs, out), _, _ = file.layout[transposed]
        raw = file.raw(transposed)
        return StoredTensor((out, num_inputs), dtype, lambda part: np.ascontiguousarray(raw[:, part].T, np.float32)), [transposed]
    return (file.plain(target), [target]) if target in file.layout else (None, [])


def _blockwise(codes: NDArray[np.uint8], scales: Values, bits: int) -> StoredTensor:
    """MatMulNBits: codes uint8 [out, blocks, block * bits / 8], scales [out, blocks]."""
    out, num_blocks, width = codes.shape
    size = width * 8 // bits
    scales = scales.reshape(out, num_blocks)

    def rows(part: slice) -> Values:
        data = codes[part]
        values = np.stack([data & 15, data >> 4], axis=-1) if bits == 4 else data
        return _grouped(values.reshape(len(data), -1), scales[part], float(1 << bits - 1))

    return StoredTensor((out, num_blocks * size), f"U{bits} in groups of {size}", rows)


def _some_rows(stored: StoredTensor, begin: int, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(
        (min(shape[0], stored.shape[0] - begin), *stored.shape[1:]),
        stored.storage,
        lambda part: stored.rows(slice(begin + part.start, begin + part.stop)),
    )


def _read_gguf(path: Path, config: Mapping[str, Any], scheme: str) -> StoredWeights:
    from deploy_targets.quantizers.gguf_plan import plan_of

    header, data = read_gguf(path), np.memmap(path, np.uint8, "r")
    types = {name: (size, num_bytes) for name, size, num_bytes in BLOCKS.values()}
    tensors = {}
    places = plan_of(config, scheme)
    for source, place in places.items():
        if place.name in header.tensors:
            kind, shape, offset, length = header.tensors[place.name]
            size, num_bytes = types[kind]
            raw = data[offset : offset + length].reshape(shape[0], -1) if len(shape) > 1 else data[offset : offset + length]
            order = _uninterleaved(shape[0], place.num_heads) if place.num_heads else None
            tensors[source] = StoredTensor(shape, kind, partial(_gguf_rows, raw, kind, order))
            assert length == math.prod(shape) // size * num_bytes
    known = {place.name for place in places.values()}
    return StoredWeights(tensors, tuple(sorted(set(header.tensors) - known)))


def _gguf_rows(raw: NDArray[np.uint8], kind: str, order: NDArray[np.int_] | None, rows: slice) -> Values:
    from gguf import GGMLQuantizationType, quants

    if raw.ndim == 1:
        return _plain_rows(raw.view(_NUMPY[kind]), kind, rows)
    part = np.ascontiguousarray(raw[rows] if order is None else raw[order[rows]])
    if kind in ("F32", "F16", "BF16"):
        return _plain_rows(part.view(_NUMPY[kind]), kind, slice(None))
    values: Values = quants.dequantize(part, GGMLQuantizationType[kind]).astype(np.float32, copy=False)
    return values


def _uninterleaved(num_rows: int, num_heads: int) -> NDArray[np.int_]:
    """Where each row of the checkpoint lies in the file: llama.cpp interleaves the halves of each head of the architecture llama."""
    return np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2).swapaxes(1, 2).reshape(-1)
