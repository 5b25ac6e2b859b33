"""One version of a file as its difference to the last: most words of quantized weights do not change from step to step.

    delta = zstd( new XOR old )          bytes beyond the end of the old file as they are

Equal words become zeros, which cost next to nothing. Both sides read and write block by block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard

from deploy_targets.errors import WeightsError

BLOCK_BYTES = 1 << 22
_LEVEL = 1
"""Zeros are found at any level; higher ones cost more time than a network of 1 Gbit/s saves."""
_MAX_WINDOW_BYTES = 1 << 27


def packed(path: Path, base: Path | None) -> Iterator[bytes]:
    """The file at `path` as compressed blocks, against `base` where one is given."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
    with ExitStack() as stack:
        new = stack.enter_context(open(path, "rb"))
        old = None if base is None else stack.enter_context(open(base, "rb"))
        while block := new.read(BLOCK_BYTES):
            if chunk := compressor.compress(block if old is None else _xor(block, old.read(len(block)))):
                yield chunk
    yield compressor.flush()


def unpack(packed: BinaryIO, out: Path, base: Path | None, max_bytes: int) -> str:
    """Write to `out` what `packed` made; returns its sha256 as hex. One that ends too early is told by that alone.

    Raises `WeightsError` for what is no such stream or unpacks to more than `max_bytes`.
    """
    digest, written = hashlib.sha256(), 0
    with ExitStack() as stack:
        new = stack.enter_context(open(out, "wb"))
        old = None if base is None else stack.enter_context(open(base, "rb"))
        blocks = stack.enter_context(zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(packed, closefd=False))
        while True:
            try:
                block = blocks.read(BLOCK_BYTES)
            except zstandard.ZstdError as error:
                raise WeightsError(f"what was sent cannot be unpacked: {error}") from None
            if not block:
                return digest.hexdigest()
            if (written := written + len(block)) > max_bytes:
                raise WeightsError(f"what was sent unpacks to more than {max_bytes} bytes")
            data = block if old is None else _xor(block, old.read(len(block)))
            digest.update(data)
            new.write(data)


def _xor(new: bytes, old: bytes) -> bytes:
    common = min(len(new), len(old))
    return np.bitwise_xor(np.frombuffer(new, np.uint8, common), np.frombuffer(old, np.uint8, common)).tobytes() + new[common:]
