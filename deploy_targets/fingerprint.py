"""What an export knows of every tensor and setting, so small that it travels with the artifact: `fingerprint.json`, readable without torch.

    model_config   the learner's config.json
    settings       "FILE: key" -> value, of every JSON file that an engine reads, of graph or header, of profile and sampling
    tensors        learner's name -> `TensorMark`

Of a tensor W a sketch is kept: 32 sums of its values under random signs, s_b = sum over i = b (mod 32) of sign_i W_i. For two tensors A and
B, the sum over b of (s_b(A) - s_b(B))^2 is an unbiased estimate of |A - B|^2 with a relative standard deviation of at most sqrt(2 / 32)
(count sketch, https://doi.org/10.1016/S0304-3975(03)00400-6; as an estimate of distances, arXiv 1206.5725). So the box that serves can say
how far each layer lies from the learner's weights, which it never sees. Signs are raw output of PCG64, which numpy keeps stable.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy_targets.catalog import QUANTIZERS
from deploy_targets.errors import ArtifactError
from deploy_targets.gguf_file import GGUF_FILE, read_gguf
from deploy_targets.manifest import SamplingRecord
from deploy_targets.onnx_file import graph_settings
from deploy_targets.profile import TargetProfile
from deploy_targets.stored_weights import StoredTensor, Values, read_stored, row_blocks
from deploy_targets.vocabulary import TOKENIZER_FILE, read_vocabulary
from deploy_targets.weights_file import sha256_of

FINGERPRINT_FILE = "fingerprint.json"
FORMAT = "fingerprint-1"
_SUMS = 32
_JSON_FILES = ("config.json", "generation_config.json", "genai_config.json", "tokenizer_config.json")
_PASSING = ("transformers_version", "_name_or_path", "name_or_path")
"""Keys that say who wrote a file."""
_LONGEST_TEXT = 64

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TensorMark:
    """One tensor of the learner, and what the artifact holds in its place.

    `norm`: Euclidean, of the learner's values. `largest`: largest absolute value stored. `zeros`: share of stored values that are 0.
    `error`: |stored - learner| / |learner|. `learner`, `stored`: sketches, float32 [32], base64.
    """

    shape: tuple[int, ...]
    storage: str
    norm: float
    largest: float
    zeros: float
    error: float
    learner: str
    stored: str


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The content of `fingerprint.json`."""

    model_config: Mapping[str, Any]
    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorMark]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Learner's name -> shape."""
        return {name: mark.shape for name, mark in self.tensors.items()}


@dataclass(frozen=True, slots=True)
class LearnedTensor:
    """One tensor of a probed model: its norm, and its sketch as in `TensorMark`."""

    shape: tuple[int, ...]
    norm: float
    learner: str


@dataclass(frozen=True, slots=True)
class LearnedWeights:
    """What probes may hold of a model's weights, for artifacts of it that have no fingerprint."""

    model_config: Mapping[str, Any]
    tensors: Mapping[str, LearnedTensor]


@dataclass(slots=True)
class Sketch:
    """Sums and statistics of one tensor, block by block."""

    sums: NDArray[np.float64]
    square: float = 0.0
    largest: float = 0.0
    num_zeros: int = 0
    num_nonfinite: int = 0
    num_values: int = 0

    @classmethod
    def of(cls, name: str, blocks: Iterable[Values]) -> Sketch:
        """Of the tensor `name`, given as `StoredTensor.blocks` gives it; a value that is not finite counts as 0."""
        sketch = cls(np.zeros(_SUMS))
        for index, block in enumerate(blocks):
            sketch._add(name, index, np.ravel(block))
        return sketch

    def _add(self, name: str, index: int, values: Values) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            self.num_nonfinite += int((~finite).sum())
            values = np.where(finite, values, np.float32(0))
        self.num_values += values.size
        self.num_zeros += int((values == 0).sum())
        self.largest = max(self.largest, float(np.abs(values).max(initial=0)))
        self.square += float(np.dot(values, values))
        generator = np.random.PCG64([zlib.crc32(name.encode()), index])
        bits = np.unpackbits(generator.random_raw(-(-values.size // 64)).view(np.uint8), count=values.size)
        signed = np.zeros(-(-values.size // _SUMS) * _SUMS, np.float32)
        np.multiply(values, 1 - 2 * bits.astype(np.float32), out=signed[: values.size])
        self.sums += signed.reshape(-1, _SUMS).sum(0, dtype=np.float64)

    @property
    def text(self) -> str:
        """The sums as base64."""
        return base64.b64encode(self.sums.astype("<f4").tobytes()).decode()

    def distance(self, text: str) -> float:
        """Estimate of the Euclidean distance to the tensor whose sums are `text`."""
        return float(np.linalg.norm(self.sums.astype("<f4") - np.frombuffer(base64.b64decode(text), "<f4")))


def write_fingerprint(
    folder: Path,
    profile: TargetProfile,
    sampling: SamplingRecord,
    temperature: float,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Values]],
) -> Fingerprint:
    """Write `fingerprint.json` into the artifact `folder`, which holds everything but its manifest.

    `temperature` is that of the probes, `config` the learner's config.json, `tensors` its own weights in high precision, of `shapes`.
    Weights in a format that a plug-in's quantizer made up are left out. Raises `ArtifactError` where a tensor is lost or has another shape.
    """
    marks = _marks(folder, profile, config, shapes, tensors)
    settings = read_settings(folder, profile, sampling, temperature) | _learner_settings(config, profile)
    fingerprint = Fingerprint(config, settings, marks)
    data = {
        "format": FORMAT,
        "model_config": config,
        "settings": fingerprint.settings,
        "tensors": {name: asdict(mark) for name, mark in marks.items()},
    }
    (folder / FINGERPRINT_FILE).write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    return fingerprint


def _marks(
    folder: Path,
    profile: TargetProfile,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Values]],
) -> dict[str, TensorMark]:
    if profile.scheme.quantizer not in QUANTIZERS:
        return {}
    stored = read_stored(folder, config, shapes, profile.scheme.name).tensors
    marks: dict[str, TensorMark] = {}
    for name, values in tensors:
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # the same matrix as the embedding, which some learners list twice
        if name not in stored or stored[name].shape != values.shape:
            raise ArtifactError(f"{folder}: the weights have no place, or one of another shape, for {name} {list(values.shape)}")
        marks[name] = _mark(name, values, stored[name])
    return marks


def _mark(name: str, values: Values, stored: StoredTensor) -> TensorMark:
    served, learner = Sketch.of(name, stored.blocks()), Sketch.of(name, (values[part] for part in row_blocks(values.shape)))
    differences = (np.ravel(stored.rows(part) - values[part]) for part in row_blocks(values.shape))
    error = math.sqrt(sum(float(np.dot(difference, difference)) for difference in differences))
    norm = math.sqrt(learner.square)
    return TensorMark(
        values.shape,
        stored.storage,
        norm,
        served.largest,
        served.num_zeros / max(1, served.num_values),
        error / norm if norm else error,
        learner.text,
        served.text,
    )


def sketch_weights(config: Mapping[str, Any], tensors: Iterable[tuple[str, Values]]) -> str:
    """`LearnedWeights` of a model as JSON: `config` is its config.json, `tensors` its weights, one after the other."""
    learned = {}
    for name, values in tensors:
        sketch = Sketch.of(name, (values[part] for part in row_blocks(values.shape)))
        learned[name] = asdict(LearnedTensor(values.shape, math.sqrt(sketch.square), sketch.text))
    return json.dumps({"model_config": config, "tensors": learned})


def read_learned(text: str) -> LearnedWeights:
    """What `sketch_weights` wrote. Raises `ArtifactError` for anything else."""
    try:
        data = json.loads(text)
        tensors = {name: LearnedTensor(tuple(entry["shape"]), entry["norm"], entry["learner"]) for name, entry in data["tensors"].items()}
        return LearnedWeights(dict(data["model_config"]), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"the probes hold no readable sketches of the weights: {error!r}. Record them again") from error


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint of an artifact; None where it has none. Raises `ArtifactError` for one that does not parse."""
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} is not {FORMAT!r}")
        tensors = {name: TensorMark(**{**mark, "shape": tuple(mark["shape"])}) for name, mark in data["tensors"].items()}
        return Fingerprint(dict(data["model_config"]), dict(data["settings"]), tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no readable fingerprint: {error!r}. Export the artifact again") from error


def read_settings(folder: Path, profile: TargetProfile, sampling: SamplingRecord, temperature: float) -> Settings:
    """Everything but the weights that decides what the artifact computes, as "FILE: key" -> plain JSON value.

    `temperature` is that of the probes.
    """
    settings: Settings = {}
    for name in _JSON_FILES:
        if (folder / name).is_file():
            settings.update({f"{name}: {key}": value for key, value in _flat(_json(folder / name)) if key not in _PASSING})
    if (folder / TOKENIZER_FILE).is_file():
        settings[f"{TOKENIZER_FILE}: vocabulary"] = read_vocabulary(folder / TOKENIZER_FILE).sha256
        rest = {key: value for key, value in _json(folder / TOKENIZER_FILE).items() if key not in ("model", "added_tokens")}
        settings[f"{TOKENIZER_FILE}: how text is split"] = _sha256(json.dumps(rest, sort_keys=True))
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            settings[f"{name}: chat_template"] = sha256_of(folder / name)
    if (folder / "model.onnx").is_file():
        settings.update({f"model.onnx: {key}": value for key, value in graph_settings(folder / "model.onnx").items()})
        settings["model.onnx: graph"] = sha256_of(folder / "model.onnx")
    if (folder / GGUF_FILE).is_file():
        settings.update(_gguf_settings(folder / GGUF_FILE))
    engine = profile.engine
    settings.update({f"profile: {key}": value for key, value in _flat(profile.scheme.model_dump(mode="json"))})
    settings.update({f"profile: engine.options.{key}": _short(value) for key, value in engine.options.items()})
    settings.update({"profile: engine.name": engine.name, "profile: max_model_len": profile.max_model_len})
    settings.update({"sampling: stop_token_ids": list(sampling.stop_token_ids), "probes: temperature": temperature})
    plain: Settings = json.loads(json.dumps(settings))
    return plain


def _gguf_settings(path: Path) -> Settings:
    header = read_gguf(path)
    begin = min((offset for _, _, offset, _ in header.tensors.values()), default=0)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(begin)).hexdigest()
    scalars = {f"{GGUF_FILE}: {key}": _short(value) for key, value in header.metadata.items()}
    return {**scalars, f"{GGUF_FILE}: header": digest}


def _learner_settings(config: Mapping[str, Any], profile: TargetProfile) -> Settings:
    """What the learner computed with, where the artifact says it in a place of its own: an export that lost it shows."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_parameters") or {})}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        return {}
    return {"model.onnx: rope_theta": float(rope["rope_theta"])} if profile.engine.name == "onnxruntime" else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) of everything in nested objects; lists stay whole, long texts become their hash."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, _short(value)


def _short(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    return value if len(text) <= _LONGEST_TEXT else f"sha256 {_sha256(text)}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
