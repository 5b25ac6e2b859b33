"""The artifact itself, held against its fingerprint before an engine is started: every setting, every tensor.

    settings   each value that decides what is computed, one by one; and whether the longest probe fits
    weights    each tensor, dequantized: how far it lies from what was exported (`changed`), and from the learner's own weights (`error`)

Both are estimates from sketches (`fingerprint.py`), shares of the norm of the learner's tensor; `changed` is 0 but for rounding where the
bytes are the exported ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy_targets.errors import ArtifactError, DeployTargetsError
from deploy_targets.fingerprint import Fingerprint, Sketch, TensorMark, read_fingerprint, read_learned, read_settings
from deploy_targets.manifest import Manifest
from deploy_targets.memory import max_tokens
from deploy_targets.probes import ProbeSet
from deploy_targets.stored_weights import StoredTensor, read_stored

SAME = 1e-6
"""A tensor further than this share of its norm from the exported one was changed: rounding of float32 sums is a tenth of it."""
_ABSENT = "absent"
_MOST_NAMED = 3
_HEADS = ("lm_head.weight", "output.weight")
_TITLES = {
    "rope_theta": "rope theta", "freq_base": "rope theta", "eos_token_id": "EOS id", "stop_token_ids": "EOS id", "eos_token": "EOS token",
    "chat_template": "chat template", "vocabulary": "tokenizer vocabulary",
    "tokens": "tokenizer vocabulary", "group_size": "group size", "block_size": "group size",
    "tie_word_embeddings": "tied embeddings", "ignore": "ignored modules", "kv_cache_dtype": "KV cache dtype",
    "max_model_len": "length limit", "max_position_embeddings": "length limit", "context_length": "length limit",
}  # fmt: skip
"""Last part of a setting's name -> what it is called."""


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting that is not what it was at export. `name`: "FILE: key"."""

    name: str
    expected: Any
    found: Any

    @property
    def title(self) -> str:
        """What the setting is called, e.g. `rope theta`."""
        key = self.name.partition(": ")[2]
        return _TITLES.get(key.rpartition(".")[2], key)

    @property
    def is_whole_file(self) -> bool:
        """Whether it is only the hash of a graph or header: something in it differs, and this does not say what."""
        return self.name.rpartition(": ")[2] in ("graph", "header")

    def __str__(self) -> str:
        """One line."""
        return f"{self.title}: {self.detail}"

    @property
    def detail(self) -> str:
        """What was expected, what was found, and where."""
        return f"{self.expected} at export, {self.found} here ({self.name})"


@dataclass(frozen=True, slots=True)
class Layer:
    """One tensor as it is served. `problem` is empty where it is what was exported.

    `error`, `error_at_export`: distance from the learner's tensor, here (estimated, 12 % standard deviation) and exactly at export;
    `changed`: distance from the exported one; all three as shares of the learner's norm, None where the tensor could not be compared.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    error: float | None
    error_at_export: float | None
    changed: float | None
    nonfinite: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found out about an artifact without running it; empty where it has no fingerprint (`num_settings` is then 0)."""

    num_settings: int = 0
    settings: tuple[SettingDifference, ...] = ()
    layers: tuple[Layer, ...] = ()

    @property
    def changed_layers(self) -> list[Layer]:
        """Tensors with a problem."""
        return [layer for layer in self.layers if layer.problem]

    @property
    def problems(self) -> list[str]:
        """One line each."""
        return [*map(str, self.settings), *(f"{layer.name}: {layer.problem}" for layer in self.changed_layers)]


@dataclass(frozen=True, slots=True)
class ModuleDeparture:
    """The output of one module with the artifact's weights against the learner's, as shares of its norm; see hetero_rl/bisect.py.

    `local_error`: on the learner's own inputs; `error`: on those that the layers before made. `departs`: the local error is unusual.
    """

    name: str
    local_error: float
    error: float
    departs: bool


@dataclass(frozen=True, slots=True)
class Activations:
    """A layer-wise comparison, in the order in which modules run."""

    num_sequences: int
    modules: tuple[ModuleDeparture, ...]

    @property
    def first(self) -> ModuleDeparture | None:
        """The first module that departs."""
        return next((module for module in self.modules if module.departs), None)


def kind_of(name: str) -> str:
    """The name of a module or tensor without the numbers of layers and experts."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def inspect_artifact(folder: Path, manifest: Manifest, probes: ProbeSet) -> Inspection:
    """Hold the artifact in `folder` against its fingerprint; one of another tool against what the probes say of the model's weights.

    Raises `ArtifactError` for files that do not parse.
    """
    fingerprint = read_fingerprint(folder)
    if fingerprint is None:
        return Inspection() if manifest.is_sealed else Inspection(layers=tuple(_foreign_layers(folder, manifest, probes)))
    found = read_settings(folder, manifest.profile, manifest.sampling, probes.temperature)
    names = sorted(fingerprint.settings.keys() | found.keys())
    differences = [
        SettingDifference(name, fingerprint.settings.get(name, _ABSENT), found.get(name, _ABSENT))
        for name in names
        if fingerprint.settings.get(name, _ABSENT) != found.get(name, _ABSENT)
    ]
    limit = max_tokens(manifest.profile, fingerprint.model_config)
    longest = max(len(probe.sequence.tokens) for probe in probes.probes)
    if longest > limit:
        differences.append(SettingDifference("profile: max_model_len", f"probes of up to {longest} tokens", limit))
    # The most telling first: those with a name of their own, before hashes of whole files.
    differences.sort(key=lambda difference: difference.title == difference.name.partition(": ")[2])
    return Inspection(len(names), tuple(differences), tuple(_layers(folder, manifest, fingerprint)))


def _layers(folder: Path, manifest: Manifest, fingerprint: Fingerprint) -> Iterator[Layer]:
    if not fingerprint.tensors:
        return
    stored = read_stored(folder, fingerprint.model_config, fingerprint.shapes, manifest.profile.scheme.name)
    for name, mark in fingerprint.tensors.items():
        tensor = stored.tensors.get(name)
        if tensor is None:
            yield Layer(name, mark.shape, _ABSENT, None, mark.error, None, 0, "is missing")
        elif tensor.shape != mark.shape:
            problem = f"has the shape {list(tensor.shape)}, exported as {list(mark.shape)}"
            yield Layer(name, tensor.shape, tensor.storage, None, mark.error, None, 0, problem)
        else:
            yield _compared(name, tensor, mark)
    untied = bool(fingerprint.model_config.get("tie_word_embeddings"))
    for name in stored.unknown:
        yield Layer(name, (), "?", None, None, None, 0, _new(name in _HEADS and untied))
    for name in stored.tensors.keys() - fingerprint.tensors.keys():
        tensor = stored.tensors[name]
        yield Layer(name, tensor.shape, tensor.storage, None, None, None, 0, _new(name in _HEADS and untied))


def _foreign_layers(folder: Path, manifest: Manifest, probes: ProbeSet) -> Iterator[Layer]:
    """How far the tensors of an artifact that another tool made lie from the probed model's; those that are stored in a known form.

    Nothing says how they should be stored, so that a form which cannot be read is no fault: there is nothing to say of it then.
    """
    if not probes.weights:
        return
    learned = read_learned(probes.weights)
    shapes = {name: tensor.shape for name, tensor in learned.tensors.items()}
    try:
        stored = read_stored(folder, learned.model_config, shapes, manifest.profile.scheme.name).tensors
    except ArtifactError:
        return
    for name, mark in learned.tensors.items():
        if name in stored and stored[name].shape == mark.shape:
            sketch = Sketch.of(name, stored[name].blocks())
            error = sketch.distance(mark.learner) / (mark.norm or 1.0)
            problem = "is all zeros" if sketch.largest == 0 < mark.norm else ""
            if sketch.num_nonfinite:
                problem = f"holds {sketch.num_nonfinite} values that are not finite"
            yield Layer(name, mark.shape, stored[name].storage, error, None, None, sketch.num_nonfinite, problem)


def _new(is_untied_head: bool) -> str:
    head = ": an output head of its own, where embeddings were tied" if is_untied_head else ""
    return f"is in the file and was not exported{head}"


def _compared(name: str, tensor: StoredTensor, mark: TensorMark) -> Layer:
    sketch = Sketch.of(name, tensor.blocks())
    norm = mark.norm or 1.0
    error, changed = sketch.distance(mark.learner) / norm, sketch.distance(mark.stored) / norm
    problem = ""
    if sketch.num_nonfinite:
        problem = f"holds {sketch.num_nonfinite} values that are not finite"
    elif tensor.storage != mark.storage:
        problem = f"is stored as {tensor.storage}, exported as {mark.storage}"
    elif changed > SAME:
        zeros = "is all zeros, and " if sketch.largest == 0 else ""
        problem = f"{zeros}differs from what was exported by {changed:.2g} of its norm"
    return Layer(name, tensor.shape, tensor.storage, error, mark.error, changed, sketch.num_nonfinite, problem)


@contextmanager
def explained(inspection: Inspection) -> Iterator[None]:
    """Errors within say what is wrong with the artifact, where something is: an engine that does not start is rarely so clear."""
    try:
        yield
    except DeployTargetsError as error:
        if not inspection.problems:
            raise
        raise ArtifactError(f"{error}\nThe artifact is not what was exported:\n{listed(inspection.problems, 20)}") from error


def listed(lines: list[str], most: int) -> str:
    """One line each, indented, of which at most so many."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  - {line}" for line in [*lines[:most], *more])


def some(lines: list[str]) -> str:
    """A few of the lines in one."""
    more = f"; and {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
    return "; ".join(lines[:_MOST_NAMED]) + more
