"""Golden probes: token sequences with the learner's log-probs, recorded at export and replayed on the target.

One safetensors file, readable without torch. Sequence i owns `tokens[offsets[i]:offsets[i + 1]]`; its scored tokens are those
from `prompt_lens[i]` on, and what the learner says about them lies one sequence after the other:

    tokens               int32   [num_tokens]
    offsets              int64   [num_sequences + 1]
    prompt_lens          int32   [num_sequences]
    kinds                uint8   [num_sequences]     place in `KINDS`
    learner_logps        float32 [num_scored]        nats, at the temperature in the file's metadata, in the learner's arithmetic
    learner_greedy       int32   [num_scored]        the learner's most probable token at each scored position
    learner_logps_fp32   float32 [num_scored]        the same weights computed in float32
    learner_entropy      float32 [num_scored]        nats
    learner_top_ids      int32   [num_scored, k]     the k most probable tokens, falling
    learner_top_logps    float32 [num_scored, k]

The last four are there together or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deploy_targets.artifact import write_atomically
from deploy_targets.errors import ArtifactError
from deploy_targets.types import TokenSequence

Kind = Literal["policy", "greedy", "long", "rare", "certain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""`policy`: sampled on the task by what is deployed; gap and tolerance are about these. `greedy`: its most probable continuations.
`long`: the end of contexts as long as the target allows. `rare`: ids from all over the vocabulary, special tokens left out.
`certain`: stretches of greedy continuations on which the learner is nearly certain."""

FORMAT = "probes-2"
_BASE = {
    "tokens": "int32", "offsets": "int64", "prompt_lens": "int32", "kinds": "uint8", "learner_logps": "float32", "learner_greedy": "int32",
}  # fmt: skip
_DETAILS = {"learner_logps_fp32": "float32", "learner_entropy": "float32", "learner_top_ids": "int32", "learner_top_logps": "float32"}
_OF_TOP = ("learner_top_ids", "learner_top_logps")
_LOGPS = ("learner_logps", "learner_logps_fp32", "learner_top_logps")
_LARGEST_LOGP = 1e-4
"""Rounding may put the log-prob of a certain token a little above zero."""


@dataclass(frozen=True, slots=True)
class LearnerDetails:
    """More of what the learner says about each scored token; arrays as in the file, without `learner_` before their names."""

    logps_fp32: NDArray[np.float32]
    entropy: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logps: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Probe:
    """One sequence and what the learner says about its response tokens.

    `learner_logps`: float32 [num_scored], nats, by the learner's high-precision weights in the learner's arithmetic.
    `learner_greedy`: int32 [num_scored], the learner's most probable token at each of these positions.
    `details` is None in files that have none.
    """

    sequence: TokenSequence
    learner_logps: NDArray[np.float32]
    learner_greedy: NDArray[np.int32]
    kind: Kind = "policy"
    details: LearnerDetails | None = None


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """All probes of an artifact. `temperature`, `weight_version` and `learner_dtype` hold for every log-prob in it.

    `learner_dtype`: the learner's arithmetic, e.g. `bfloat16`. `source_model`: what was probed. `vocab_size`: its logits.
    `vocabulary_sha256`: of its tokenizer, see `read_vocabulary`. `weights`: sketches of its weights, see `sketch_weights`; an artifact
    has them in its fingerprint. Empty or None in files that do not say.
    """

    probes: tuple[Probe, ...]
    temperature: float
    weight_version: int
    learner_dtype: str = ""
    source_model: str = ""
    vocab_size: int | None = None
    vocabulary_sha256: str = ""
    weights: str = ""

    def of_kind(self, kind: Kind) -> ProbeSet:
        """The probes of one kind."""
        return replace(self, probes=tuple(probe for probe in self.probes if probe.kind == kind))

    def num_scored(self, kind: Kind) -> int:
        """Scored tokens of the probes of one kind."""
        return sum(len(probe.learner_logps) for probe in self.probes if probe.kind == kind)


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
        "kinds": np.array([KINDS.index(probe.kind) for probe in probes], dtype=np.uint8),
        "learner_logps": np.concatenate([np.empty(0, np.float32), *(probe.learner_logps for probe in probes)], dtype=np.float32),
        "learner_greedy": np.concatenate([np.empty(0, np.int32), *(probe.learner_greedy for probe in probes)], dtype=np.int32),
    }
    details = [probe.details for probe in probes if probe.details is not None]
    if details:
        for name, dtype in _DETAILS.items():
            parts = [getattr(detail, name.removeprefix("learner_")) for detail in details]
            arrays[name] = np.ascontiguousarray(np.concatenate(parts), dtype=dtype)
    metadata = {
        "format": FORMAT,
        "temperature": repr(float(probe_set.temperature)),
        "weight_version": str(probe_set.weight_version),
        "learner_dtype": probe_set.learner_dtype,
        "source_model": probe_set.source_model,
        "vocab_size": "" if probe_set.vocab_size is None else str(probe_set.vocab_size),
        "vocabulary_sha256": probe_set.vocabulary_sha256,
        "weights": probe_set.weights,
    }
    _validate(path, arrays, metadata)
    write_atomically(path, save(arrays, metadata))


def read_probes(path: Path) -> ProbeSet:
    """The probes in the safetensors file `path`.

    Raises `ArtifactError` for a file that is no safetensors file, lacks an array, has one of the wrong dtype or shape, or holds
    a non-finite learner log-prob.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} holds no readable probes: {error}") from error
    temperature, weight_version, vocab_size = _validate(path, arrays, metadata)
    kinds = arrays["kinds"].tolist()
    offsets, starts = arrays["offsets"].tolist(), arrays["prompt_lens"].tolist()
    ends = np.cumsum(np.diff(arrays["offsets"]) - arrays["prompt_lens"]).tolist()
    probes = []
    for index, (begin, end, prompt_len, scored_end) in enumerate(zip(offsets[:-1], offsets[1:], starts, ends, strict=True)):
        scored = slice(ends[index - 1] if index else 0, scored_end)
        sequence = TokenSequence(tuple(arrays["tokens"][begin:end].tolist()), prompt_len)
        details = LearnerDetails(*(arrays[name][scored] for name in _DETAILS)) if "learner_entropy" in arrays else None
        probes.append(Probe(sequence, arrays["learner_logps"][scored], arrays["learner_greedy"][scored], KINDS[kinds[index]], details))
    return ProbeSet(
        tuple(probes),
        temperature,
        weight_version,
        learner_dtype=metadata.get("learner_dtype", ""),
        source_model=metadata.get("source_model", ""),
        vocab_size=vocab_size,
        vocabulary_sha256=metadata.get("vocabulary_sha256", ""),
        weights=metadata.get("weights", ""),
    )


def _validate(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> tuple[float, int, int | None]:
    """Temperature, weight_version and vocabulary size of probes that are whole; raises `ArtifactError` listing everything that is not."""
    found = {name: str(array.dtype) for name, array in arrays.items()}
    expected = {**_BASE, **_DETAILS} if _DETAILS.keys() & found.keys() else _BASE
    problems = [] if found == expected else [f"arrays are {found}, expected {expected}"]
    problems += [
        f"array {name} has {array.ndim} dimensions, expected {1 + (name in _OF_TOP)}"
        for name, array in arrays.items()
        if array.ndim != 1 + (name in _OF_TOP)
    ]
    if metadata.get("format") != FORMAT:
        problems.append(f"format is {metadata.get('format')!r}, expected {FORMAT!r}")
    try:
        temperature, weight_version = float(metadata.get("temperature", "")), int(metadata.get("weight_version", ""))
        vocab_size = int(metadata["vocab_size"]) if metadata.get("vocab_size") else None
    except ValueError:
        temperature, weight_version, vocab_size = math.nan, -1, None
    if not 0 < temperature < math.inf or weight_version < 0 or (vocab_size is not None and vocab_size < 1):
        problems.append("temperature (positive), weight_version (0 or more) or vocab_size (positive) is missing or no such number")
    problems = problems or _length_problems(arrays) or _value_problems(arrays, vocab_size)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ArtifactError(f"{path} holds no usable probes:\n{lines}\nRecord them again, with `hetero-rl export` or `hetero-rl probe`.")
    return temperature, weight_version, vocab_size


def _length_problems(arrays: Mapping[str, NDArray[Any]]) -> list[str]:
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
    for name in ("learner_logps", "learner_greedy", *_DETAILS):
        if name in arrays and len(arrays[name]) != num_scored:
            problems.append(f"{name} has {len(arrays[name])} entries for {num_scored} scored tokens")
    if len(arrays["kinds"]) != len(lengths):
        problems.append(f"kinds has {len(arrays['kinds'])} entries for {len(lengths)} sequences")
    ids, logps = (arrays.get(name, np.empty((0, 1))) for name in _OF_TOP)
    if ids.shape[1] < 1 or ids.shape[1] != logps.shape[1]:
        problems.append(f"learner_top_ids has {ids.shape[1]} tokens a position, learner_top_logps {logps.shape[1]}")
    return problems


def _value_problems(arrays: Mapping[str, NDArray[Any]], vocab_size: int | None) -> list[str]:
    problems = []
    for name in _LOGPS:
        with np.errstate(invalid="ignore"):  # a signalling NaN is one more value that is not finite
            logps = arrays.get(name, np.empty(0)).astype(np.float64)
        if not np.isfinite(logps).all() or (logps > _LARGEST_LOGP).any():
            problems.append(f"{name} holds values that are no log-probs (non-finite or positive)")
    entropy = arrays.get("learner_entropy", np.empty(0))
    if not np.isfinite(entropy).all() or (entropy < -_LARGEST_LOGP).any():
        problems.append("learner_entropy holds values that are no entropies (non-finite or negative)")
    top = arrays.get("learner_top_logps", np.empty((0, 1)))
    if (top[:, 1:] > top[:, :-1]).any():
        problems.append("learner_top_logps do not fall")
    for name in ("tokens", "learner_top_ids"):
        ids = arrays.get(name, np.empty(0)).astype(np.int64)
        if (ids < 0).any() or (vocab_size is not None and (ids >= vocab_size).any()):
            problems.append(f"{name} holds ids that are negative or beyond the vocabulary of {vocab_size}")
    if (arrays["kinds"] >= len(KINDS)).any():
        problems.append(f"kinds holds numbers beyond {len(KINDS) - 1}; the kinds are {', '.join(KINDS)}")
    elif not (arrays["kinds"] == 0).any():
        problems.append(f"there is no probe of the kind {KINDS[0]!r}, which gap and tolerance are about")
    return problems
