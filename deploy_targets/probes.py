"""Golden probes: token sequences with the learner's log-probs, recorded at export and replayed on the target.

One safetensors file, readable without torch. Sequence i owns `tokens[offsets[i]:offsets[i + 1]]`; its scored tokens are those
from `prompt_lens[i]` on, and their log-probs lie one sequence after the other:

    tokens          int32   [num_tokens]
    offsets         int64   [num_sequences + 1]
    prompt_lens     int32   [num_sequences]
    learner_logps   float32 [num_scored]   nats, at the temperature in the file's metadata
    learner_greedy  int32   [num_scored]   the learner's most probable token at each scored position
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deploy_targets.artifact import write_atomically
from deploy_targets.errors import ArtifactError
from deploy_targets.types import TokenSequence

FORMAT = "probes-1"
_DTYPES = {"tokens": "int32", "offsets": "int64", "prompt_lens": "int32", "learner_logps": "float32", "learner_greedy": "int32"}


@dataclass(frozen=True, slots=True)
class Probe:
    """One sequence and what the learner says about its response tokens.

    `learner_logps`: float32 [num_scored], nats, computed in float32 by the learner's high-precision weights.
    `learner_greedy`: int32 [num_scored], the learner's most probable token at each of these positions.
    """

    sequence: TokenSequence
    learner_logps: NDArray[np.float32]
    learner_greedy: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """All probes of an artifact. `temperature` and `weight_version` hold for every log-prob in it."""

    probes: tuple[Probe, ...]
    temperature: float
    weight_version: int


def write_probes(path: Path, probe_set: ProbeSet) -> None:
    """Write `probe_set` to the safetensors file `path`, in one rename.

    Raises `ArtifactError` for anything `read_probes` would refuse, so that a bad probe stops the export and not the deployment.
    """
    probes = probe_set.probes
    lengths = [len(probe.sequence.tokens) for probe in probes]
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.array([token for probe in probes for token in probe.sequence.tokens], dtype=np.int32),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "prompt_lens": np.array([probe.sequence.prompt_len for probe in probes], dtype=np.int32),
        "learner_logps": np.concatenate([np.empty(0, np.float32), *(probe.learner_logps for probe in probes)], dtype=np.float32),
        "learner_greedy": np.concatenate([np.empty(0, np.int32), *(probe.learner_greedy for probe in probes)], dtype=np.int32),
    }
    metadata = {"format": FORMAT, "temperature": repr(float(probe_set.temperature)), "weight_version": str(probe_set.weight_version)}
    _validate(path, arrays, metadata)
    write_atomically(path, save(arrays, metadata))


def read_probes(path: Path) -> ProbeSet:
    """The probes in the safetensors file `path`.

    Raises `ArtifactError` for a file that is no safetensors file, lacks an array, has one of the wrong dtype or length, or holds
    a non-finite learner log-prob.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} holds no readable probes: {error}") from error
    temperature, weight_version = _validate(path, arrays, metadata)
    offsets, starts = arrays["offsets"].tolist(), arrays["prompt_lens"].tolist()
    ends = np.cumsum(np.diff(arrays["offsets"]) - arrays["prompt_lens"]).tolist()
    probes = []
    for index, (begin, end, prompt_len, scored_end) in enumerate(zip(offsets[:-1], offsets[1:], starts, ends, strict=True)):
        scored = slice(ends[index - 1] if index else 0, scored_end)
        sequence = TokenSequence(tuple(arrays["tokens"][begin:end].tolist()), prompt_len)
        probes.append(Probe(sequence, arrays["learner_logps"][scored], arrays["learner_greedy"][scored]))
    return ProbeSet(tuple(probes), temperature, weight_version)


def _validate(path: Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> tuple[float, int]:
    """Temperature and weight_version of probes that are whole; raises `ArtifactError` listing everything that is not."""
    found = {name: str(array.dtype) for name, array in arrays.items()}
    problems = [] if found == _DTYPES else [f"arrays are {found}, expected {_DTYPES}"]
    problems += [f"array {name} has {array.ndim} dimensions, expected 1" for name, array in arrays.items() if array.ndim != 1]
    if metadata.get("format") != FORMAT:
        problems.append(f"format is {metadata.get('format')!r}, expected {FORMAT!r}")
    try:
        temperature, weight_version = float(metadata.get("temperature", "")), int(metadata.get("weight_version", ""))
    except ValueError:
        temperature, weight_version = math.nan, -1
    if not 0 < temperature < math.inf or weight_version < 0:
        problems.append("temperature (positive) or weight_version (0 or more) is missing or no such number")
    problems = problems or _length_problems(arrays)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ArtifactError(f"{path} holds no usable probes:\n{lines}\nExport the artifact again.")
    return temperature, weight_version


def _length_problems(arrays: dict[str, NDArray[Any]]) -> list[str]:
    offsets, prompt_lens = arrays["offsets"].astype(np.int64), arrays["prompt_lens"].astype(np.int64)
    if len(offsets) < 2:
        return ["there is not one sequence"]
    lengths = np.diff(offsets)
    if len(prompt_lens) != len(lengths) or offsets[0] != 0 or offsets[-1] != len(arrays["tokens"]):
        counts = f"{len(lengths)} sequences do not fit {len(prompt_lens)} prompts and {len(arrays['tokens'])} tokens"
        return [f"offsets {offsets[0]}..{offsets[-1]} of {counts}"]
    odd = np.flatnonzero((prompt_lens < 1) | (prompt_lens >= lengths))
    problems = [f"sequence {index}: prompt_len {prompt_lens[index]} of {lengths[index]} tokens" for index in odd]
    num_scored = int((lengths - prompt_lens).sum())
    for name in ("learner_logps", "learner_greedy"):
        if len(arrays[name]) != num_scored:
            problems.append(f"{name} has {len(arrays[name])} entries for {num_scored} scored tokens")
    logps = arrays["learner_logps"].astype(np.float64)
    if not np.isfinite(logps).all() or (logps > 1e-4).any():
        problems.append("learner_logps holds values that are no log-probs (non-finite or positive)")
    if (arrays["tokens"].astype(np.int64) < 0).any():
        problems.append("tokens holds negative ids")
    return problems
