"""The low-cost side of the bargain: how fast the target serves, and in how much memory. Shown, never a gate."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy_targets.manifest import Manifest
from deploy_targets.protocols import Engine
from deploy_targets.types import Sampling
from deploy_targets.weights_file import WEIGHTS_FILES

_PROC = Path("/proc")
_NUM_FIRST_TOKENS = 3
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".onnx.data")


@dataclass(frozen=True, slots=True)
class ServingCost:
    """What serving costs on this machine; None where it was not measured or cannot be known.

    `generate_tokens_per_s`: greedy, many prompts at a time. `first_token_s`: one prompt, one token, after a warm-up; median.
    `peak_memory_bytes`: see `peak_memory_bytes`. `weights_bytes`: the file of the weights in the artifact.
    """

    generate_tokens_per_s: float | None
    first_token_s: float | None
    peak_memory_bytes: int | None
    weights_bytes: int


def first_token_s(engine: Engine, prompts: Sequence[Sequence[int]], stop_token_ids: tuple[int, ...]) -> float:
    """Seconds from one prompt to one token: the median of three prompts (of one where there is one), after a warm-up on the first.

    The prompts timed are not the one of the warm-up, as far as there are others: an engine may have its cache.
    """
    sampling = Sampling(max_tokens=1, temperature=0.0, stop_token_ids=stop_token_ids)
    engine.generate(prompts[:1], sampling)
    seconds = []
    for prompt in prompts[1 : 1 + _NUM_FIRST_TOKENS] or prompts[:1]:
        started = time.perf_counter()
        engine.generate([prompt], sampling)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def peak_memory_bytes(proc: Path = _PROC) -> int | None:
    """The most memory that this process and its living descendants were resident in, bytes: the sum of each one's own peak.

    An upper bound: the peaks need not fall together, and shared pages count for each. Memory of a GPU is not in it.
    None where there is no Linux `/proc`.
    """
    peaks, children = {}, dict[int, list[int]]()
    for status in proc.glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # it ended meanwhile
            continue
        pid = int(status.parent.name)
        children.setdefault(int(fields["PPid"]), []).append(pid)
        peaks[pid] = 1024 * int(fields.get("VmHWM", "0 kB").split()[0])  # a zombie has none
    if os.getpid() not in peaks:
        return None
    family = [os.getpid()]
    for pid in family:
        family += children.get(pid, [])
    return sum(peaks[pid] for pid in family)


def weights_bytes(manifest: Manifest) -> int:
    """Size of the artifact's file of weights; of all files that other tools keep weights in, where it has no manifest."""
    if manifest.is_sealed:
        return sum(record.bytes for name, record in manifest.files.items() if name in WEIGHTS_FILES)
    return sum(record.bytes for name, record in manifest.files.items() if name.endswith(_WEIGHT_SUFFIXES))
