"""What a graph of onnxruntime-genai's builder says of itself, read without the package onnx, which a serving box does not have.

Of protobuf's wire format (https://protobuf.dev/programming-guides/encoding/) and ONNX' messages
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) only what is needed: block size and bits of the quantized products, and the
table of cosines, which the rotary embedding is known by.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deploy_targets.errors import ArtifactError

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_NODE_TYPE, _NODE_ATTRIBUTE, _ATTRIBUTE_NAME, _ATTRIBUTE_INT = 4, 5, 1, 3
_DIMS, _DATA_TYPE, _TENSOR_NAME, _RAW = 1, 2, 8, 9
_FLOATS = {1: "<f4", 10: "<f2"}
_NUMBERS = ("block_size", "bits", "accuracy_level")

Field = tuple[int, int | memoryview]


def graph_settings(path: Path) -> dict[str, object]:
    """`block_size`, `bits`, `accuracy_level` of MatMulNBits (each a number, or a sorted list where they differ), and `rope_theta`.

    Raises `ArtifactError` for a file that is no ONNX graph.
    """
    found: dict[str, set[int]] = {}
    settings: dict[str, object] = {}
    try:
        data = memoryview(path.read_bytes())
        for number, graph in _fields(data):
            if number != _GRAPH or isinstance(graph, int):
                continue
            for kind, message in _fields(graph):
                if kind == _NODE and not isinstance(message, int):
                    for name, value in _node_numbers(message):
                        found.setdefault(name, set()).add(value)
                elif kind == _INITIALIZER and not isinstance(message, int) and (theta := _rope_theta(message)) is not None:
                    settings["rope_theta"] = theta
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no readable ONNX graph: {error}") from error
    return {**{name: sorted(values)[0] if len(values) == 1 else sorted(values) for name, values in found.items()}, **settings}


def _fields(data: memoryview) -> Iterator[Field]:
    """(field number, value) of one message: a number, or the bytes of a nested one."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        match tag & 7:
            case 0:
                value, place = _varint(data, place)
                yield tag >> 3, value
            case 2:
                length, place = _varint(data, place)
                if length > len(data) - place:
                    raise ValueError("a field is longer than the file")
                yield tag >> 3, data[place : place + length]
                place += length
            case 1 | 5 as kind:
                place += 8 if kind == 1 else 4
            case kind:
                raise ValueError(f"unknown wire type {kind}")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7


def _text(value: int | memoryview) -> str:
    return "" if isinstance(value, int) else bytes(value).decode("utf-8")


def _node_numbers(node: memoryview) -> Iterator[tuple[str, int]]:
    fields = list(_fields(node))
    if not any(number == _NODE_TYPE and _text(value) == "MatMulNBits" for number, value in fields):
        return
    for number, value in fields:
        if number == _NODE_ATTRIBUTE and not isinstance(value, int):
            attribute = dict(_fields(value))
            name, integer = _text(attribute.get(_ATTRIBUTE_NAME, 0)), attribute.get(_ATTRIBUTE_INT, 0)
            if name in _NUMBERS and isinstance(integer, int):
                yield name, integer


def _rope_theta(tensor: memoryview) -> float | None:
    """The base of the rotary embedding, from the table of cosines [positions, head_dim / 2] that the graph holds."""
    fields = list(_fields(tensor))
    single = {number: value for number, value in fields if number != _DIMS}
    if _text(single.get(_TENSOR_NAME, 0)) != "cos_cache":
        return None
    dims = [size for number, value in fields if number == _DIMS for size in ([value] if isinstance(value, int) else _packed(value))]
    dtype, raw = _FLOATS.get(int(single.get(_DATA_TYPE, 0))), single.get(_RAW)
    if dtype is None or raw is None or isinstance(raw, int) or len(dims) != 2 or dims[0] < 2 or dims[1] < 2:
        return None
    table = np.frombuffer(raw, dtype).reshape(dims).astype(np.float64)
    # cos(theta^(-2i/d)) at position 1; the second frequency is where the base shows best in few digits.
    frequency = np.arccos(np.clip(table[1, 1], -1, 1))
    return float(f"{frequency ** -dims[1]:.3g}")


def _packed(data: memoryview) -> list[int]:
    values, place = [], 0
    while place < len(data):
        value, place = _varint(data, place)
        values.append(value)
    return values
