"""The header of a GGUF file, read without trusting it: llama.cpp gets a file only after this has looked at it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian). Nothing here needs a package.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from deploy_targets.errors import ArtifactError

GGUF_FILE = "model.gguf"
"""The weights of a GGUF target: the file that llama.cpp opens."""
ALIGNMENT = 32
"""Bytes to whose multiples the data of every tensor is padded; the format's default, and the only one accepted here."""

BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""ggml type -> its name, values per block, bytes per block: what llama.cpp quantizes weights to."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 16
_LONGEST_NAME = 63
_MOST_DIMENSIONS = 4

Value = str | int | float | bool
Entry = tuple[str, tuple[int, ...], int, int]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says about itself.

    `metadata`: key -> value; of an array, as the tokenizer's are, the sha256 of its items. `tensors`: name ->
    (ggml type's name, shape, offset in the file, bytes),
    the shape in the order of torch: rows first, inputs last.
    """

    metadata: dict[str, Value]
    tensors: dict[str, Entry]

    @property
    def num_embeddings(self) -> int:
        """Tokens of the vocabulary; 0 where the file holds no language model."""
        return self.tensors.get("token_embd.weight", ("", (0,), 0, 0))[1][0]

    @property
    def context_length(self) -> int | None:
        """Longest sequence of the model in tokens; None where the file does not say."""
        length = self.metadata.get(f"{self.metadata.get('general.architecture')}.context_length")
        return length if isinstance(length, int) and length > 0 else None


def read_gguf(path: Path) -> GgufHeader:
    """The checked header of a GGUF file.

    Every count, length and offset is held against the size of the file before it is used. Raises `ArtifactError` naming the
    file and what is wrong: another format or version, a header that does not parse, an unknown type, data that overlaps or
    lies beyond the end of the file.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            return _Reader(file, size).header()
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise ArtifactError(f"{path.name}: not a GGUF file that can be served: {error}") from error


class _Reader:
    """Reads one header from front to back; `ValueError` for whatever the format does not allow."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def header(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        version = self.number("I")
        if version != 3:
            raise ValueError(f"version {version} of the format, only 3 is supported")
        num_tensors, num_entries = self.count("tensors"), self.count("metadata entries")
        metadata: dict[str, Value] = {}
        for _ in range(num_entries):
            key = self.string()
            if key in metadata:
                raise ValueError(f"metadata key {key!a} stands twice")
            metadata[key] = self.value(int(self.number("I")))
        if metadata.get("general.alignment", ALIGNMENT) != ALIGNMENT:
            raise ValueError(f"general.alignment is not {ALIGNMENT}")
        places = dict(self.tensor() for _ in range(num_tensors))
        if len(places) != num_tensors:
            raise ValueError("a tensor name stands twice")
        base = _aligned(self.file.tell())
        tensors: dict[str, Entry] = {}
        end = 0
        for name, (type_name, shape, offset, length) in sorted(places.items(), key=lambda item: item[1][2]):
            if offset < end or offset % ALIGNMENT:
                raise ValueError(f"the data of tensor {name!a} overlaps or is not aligned")
            end = offset + length
            if base + end > self.size:
                raise ValueError(f"truncated: the data of tensor {name!a} lies beyond the end of the file")
            tensors[name] = (type_name, shape, base + offset, length)
        return GgufHeader(metadata, tensors)

    def tensor(self) -> tuple[str, Entry]:
        name = self.string()
        if len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"tensor name {name[:80]!a} is longer than {_LONGEST_NAME} bytes")
        num_dimensions = int(self.number("I"))
        if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!a} has {num_dimensions} dimensions")
        sizes = [int(self.number("Q")) for _ in range(num_dimensions)]
        type_id, offset = int(self.number("I")), int(self.number("Q"))
        if type_id not in BLOCKS:
            raise ValueError(f"tensor {name!a} has the unknown or unused ggml type {type_id}")
        type_name, block_size, block_bytes = BLOCKS[type_id]
        count = 1
        for size in sizes:
            if not 1 <= size <= 8 * self.size:
                raise ValueError(f"tensor {name!a} has a dimension of {size}")
            count *= size
        if sizes[0] % block_size:
            raise ValueError(f"tensor {name!a}: rows of {sizes[0]} are no whole blocks of {type_name}")
        return name, (type_name, tuple(reversed(sizes)), offset, count // block_size * block_bytes)

    def value(self, type_id: int) -> Value:
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            return self.scalar(type_id)
        item_type, count = int(self.number("I")), int(self.number("Q"))
        digest = hashlib.sha256()
        if item_type == _STRING:
            for _ in range(min(count, self.size)):  # the end of the file comes before a count that is too large
                text = self.take(int(self.number("Q")))
                digest.update(len(text).to_bytes(8, "little") + text)
        else:
            digest.update(self.take(count * struct.calcsize("<" + self.format_of(item_type))))
        return f"sha256 {digest.hexdigest()}"

    def scalar(self, type_id: int) -> Value:
        return self.number(self.format_of(type_id))

    def format_of(self, type_id: int) -> str:
        if type_id not in _SCALARS:
            raise ValueError(f"metadata of the unknown type {type_id}")
        return _SCALARS[type_id]

    def string(self) -> str:
        return self.take(int(self.number("Q"))).decode("utf-8")

    def count(self, what: str) -> int:
        count = int(self.number("Q"))
        if count > _MOST_ENTRIES:
            raise ValueError(f"{count} {what}")
        return count

    def number(self, code: str) -> int | float | bool:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        assert isinstance(value, (int, float, bool))
        return value

    def take(self, length: int) -> bytes:
        if length > self.size - self.file.tell():
            raise ValueError("truncated: the header goes beyond the end of the file")
        return self.file.read(length)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
