"""What it takes a core to make and to read the difference between two versions of the weights, and what other records know."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS
from deploy_targets.deltas import packed, unpack
from deploy_targets.weights_file import sha256_of

FILE_BYTES = 1 << 26
PARAMETERS = "100M"
ROUNDS = 5


def rates() -> dict[str, float]:
    """Bytes of a file a core second: hashed and made into a difference, where a few bytes have changed; and unpacked, which hashes again.

    By the clock of this process, which other work on the machine moves little: it shares caches alone.
    """
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, FILE_BYTES, np.uint8)
    # Random bytes are what rounded weights look like to a compressor; the share that changes is that of known() in words of a byte.
    new = np.where(rng.random(FILE_BYTES) < known()["delta_share"], rng.integers(0, 256, FILE_BYTES, np.uint8), old)
    pack_s, unpack_s = [], []
    with tempfile.TemporaryDirectory() as temporary:
        base, path, delta, out = (Path(temporary) / name for name in ("base", "next", "delta", "out"))
        base.write_bytes(old.tobytes())
        path.write_bytes(new.tobytes())
        for _ in range(ROUNDS):
            start = time.process_time()
            sha256_of(path)
            delta.write_bytes(b"".join(packed(path, base)))
            middle = time.process_time()
            with open(delta, "rb") as stream:
                unpack(stream, out, base, FILE_BYTES)
            pack_s.append(middle - start)
            unpack_s.append(time.process_time() - middle)
        assert out.read_bytes() == new.tobytes()
    return {"pack_bytes_s": FILE_BYTES / statistics.median(pack_s), "unpack_bytes_s": FILE_BYTES / statistics.median(unpack_s)}


def known() -> dict[str, float]:
    """From the records of other benchmarks, for int4-onnx."""
    deltas = json.loads((RESULTS / "delta_updates.json").read_text("utf-8"))["cases"]["int4-onnx"]
    publish = json.loads((RESULTS / "publish_targets.json").read_text("utf-8"))
    quantize_s = publish["cases"][f"int4-onnx/{PARAMETERS}"]["phases_ms"]["quantize"]["median"] / 1e3
    return {
        "delta_share": deltas["median"] / deltas["file_bytes"],
        "quantize_parameters_s": publish["settings"][PARAMETERS]["num_parameters"] / quantize_s / publish["settings"]["num_threads"],
    }
