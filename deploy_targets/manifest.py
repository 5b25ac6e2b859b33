"""The manifest of an artifact: its fields, and how a changed line of the file is found and named."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy_targets.errors import ArtifactError
from deploy_targets.profile import TargetProfile, validation_lines
from deploy_targets.types import Machine

MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "model.sig"
"""Where a signature of the artifact lies, made after the manifest and of it too: the one file that the manifest does not list."""
FORMAT_VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 1024
_FIX = "Copy the artifact again from where it was exported, or export it again; do not edit it by hand."


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One file of the artifact."""

    sha256: Sha256
    """Hash of the whole file."""
    bytes: int = Field(ge=0)
    """Its length."""


class SamplingRecord(_Record):
    """How responses are generated when task accuracy is measured on the target."""

    max_tokens: int = Field(ge=1)
    """Most tokens of one response."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end a response."""


class TaskRecord(_Record):
    """Task accuracy of the deployed weights, measured greedily at export."""

    accuracy: float = Field(ge=0, le=1)
    """Share of problems solved."""
    num_problems: int = Field(ge=1)
    """Problems in `task_sample.jsonl`."""
    reward: str
    """Name of the reward that judged them."""


class Manifest(_Record):
    """What an artifact is, where it came from, and the hash of everything in it. Every field is present in the file."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    created: str
    """Time of the export, ISO 8601, UTC."""
    hetero_rl_version: str
    """Version of the package that exported it."""
    profile: TargetProfile
    """The whole target profile: the target machine needs no profile file of its own."""
    scheme: str
    """The scheme as vLLM and llm-compressor write it, e.g. W4A16."""
    weight_version: int = Field(ge=0)
    """Number of the publish whose bytes these are."""
    source_model: str
    """Name of the model training started from."""
    floor: float | None = Field(ge=0)
    """Mean abs(p_learner - p_engine) of the untrained model: what quantization costs before training; None where nothing was trained."""
    tolerance: float = Field(ge=0)
    """Mean abs(p_learner - p_engine) the run was held to: floor + slack."""
    final_gap: float | None
    """Mean abs(p_learner - p_engine) at the end of training; None where it was not measured."""
    sampling: SamplingRecord
    """How responses are generated on the target."""
    task: TaskRecord | None
    """Task accuracy at export; None where it was not measured."""
    package_versions: dict[str, str]
    """Distribution -> version at export."""
    machine: Machine
    """The machine it was exported on."""
    files: dict[str, FileRecord]
    """Relative name -> record of every file except the manifest."""
    tensors: dict[str, Sha256]
    """Tensor of the weights file -> sha256 of the line "DTYPE [shape]" and its bytes; used to name what was damaged."""
    entry_sha256: dict[str, Sha256]
    """Every other field of this file -> sha256 of its canonical JSON."""

    @property
    def is_sealed(self) -> bool:
        """Whether it was read from an artifact; where one has none, what is found out about it stands in its place, without hashes."""
        return bool(self.entry_sha256)

    def files_sha256(self) -> str:
        """One hash of all files: that of the lines "SHA256  NAME" in the order of names, as sha256sum prints them."""
        lines = "".join(f"{record.sha256}  {name}\n" for name, record in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, checked against its own hashes; looks at no other file.

    Raises `ArtifactError` naming every field that was changed, added or removed.
    """
    manifest, problems = parse_manifest(folder)
    if problems or manifest is None:
        raise damaged(folder, problems)
    return manifest


def seal(fields: Mapping[str, Any]) -> tuple[Manifest, bytes]:
    """The manifest of `fields` (all but `entry_sha256`) with the hash of each, and the bytes of its file."""
    entries = _finite_json(Manifest.model_validate({**fields, "entry_sha256": {}}).model_dump(mode="json"))
    entries["entry_sha256"] = {name: _entry_hash(value) for name, value in entries.items() if name != "entry_sha256"}
    return Manifest.model_validate(entries), _render(entries)


def parse_manifest(folder: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest, or None where it does not validate, and everything that is wrong with it.

    Raises `ArtifactError` where there is no manifest, or one that is not JSON.
    """
    if not folder.is_dir():
        raise ArtifactError(f"artifact folder {folder} does not exist")
    path = folder / MANIFEST_FILE
    if not path.is_file() or path.is_symlink():
        reason = "is a symlink" if path.is_symlink() else "is missing: this folder is no artifact, or its export did not finish"
        raise damaged(folder, [f"{MANIFEST_FILE}: {reason}"])
    try:
        data = path.read_bytes()
        entries = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise damaged(folder, [f"{MANIFEST_FILE}: cannot be read: {error.strerror}"]) from error
    except json.JSONDecodeError as error:
        where = _field_at(data, error.lineno)
        raise damaged(
            folder, [f"{MANIFEST_FILE}: line {error.lineno}, in or after field {where!r}, is not valid JSON: {error.msg}"]
        ) from None
    except (ValueError, RecursionError) as error:
        raise damaged(folder, [f"{MANIFEST_FILE}: is not valid JSON ({error})"]) from None
    if not isinstance(entries, dict):
        raise damaged(folder, [f"{MANIFEST_FILE}: is not a JSON object"])
    version = entries.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        newer = f"{MANIFEST_FILE}: format_version {version} is newer than {FORMAT_VERSION}, the newest this package reads"
        raise damaged(folder, [newer], "cannot be read", "If it was not edited by hand, upgrade hetero-rl on this machine.")
    problems = _entry_problems(entries)
    if not problems and data != (written := _render(entries)):
        line = _first_other_line(data, written)
        field = _field_at(written, line)
        problems.append(f"{MANIFEST_FILE}: line {line}, in field {field!r}, was rewritten (spacing, order or a repeated key)")
    try:
        return Manifest.model_validate(entries), problems
    except ValidationError as error:
        return None, problems + [f"{MANIFEST_FILE}: field {line}" for line in validation_lines(error)]


def is_safe_name(name: str) -> bool:
    """Whether `name` is a relative POSIX path that stays below its folder and that every file system can hold."""
    path = PurePosixPath(name)
    lengths = [len(part.encode("utf-8", "replace")) for part in path.parts]
    return (
        bool(lengths)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and path.as_posix() == name
        and name.isprintable()
        and max(lengths) <= _MAX_NAME_BYTES
        and sum(lengths) <= _MAX_PATH_BYTES
    )


def _entry_problems(entries: Mapping[str, Any]) -> list[str]:
    recorded = entries.get("entry_sha256")
    if not isinstance(recorded, dict):
        return [f"{MANIFEST_FILE}: field 'entry_sha256' is missing or no table"]
    known = set(Manifest.model_fields) - {"entry_sha256"}
    found = set(entries) - {"entry_sha256"}
    problems = [f"{MANIFEST_FILE}: field {name!r} is missing" for name in sorted((known | set(recorded)) - found)]
    for name in sorted(found):
        if name not in known:
            problems.append(f"{MANIFEST_FILE}: field {name!r} was added")
        elif recorded.get(name) != _entry_hash(entries[name]):
            problems.append(f"{MANIFEST_FILE}: field {name!r}, or its hash in entry_sha256, was changed")
    return problems


def _finite_json(value: Any) -> Any:
    """`value` with infinities and NaN spelled as strings, which JSON can hold and pydantic reads back as floats."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite_json(item) for key, item in value.items()}
    return [_finite_json(item) for item in value] if isinstance(value, list) else value


def _entry_hash(value: Any) -> str:
    """Sha256 of the canonical JSON of one manifest field: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _render(entries: Mapping[str, Any]) -> bytes:
    return (json.dumps(entries, indent=2) + "\n").encode()


def _first_other_line(data: bytes, expected: bytes) -> int:
    mine, theirs = data.split(b"\n"), expected.split(b"\n")
    same = next((i for i, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), min(len(mine), len(theirs)) - 1)
    return same + 1


def _field_at(data: bytes, line: int) -> str:
    """The top-level field that line number `line` of a manifest belongs to, by the two spaces before its name."""
    before = [text for text in data.decode("utf-8", errors="replace").split("\n")[:line] if text.startswith('  "')]
    return before[-1].split('"')[1] if before else "(top)"


def damaged(folder: Path, problems: list[str], what: str = "is not what was exported", fix: str = _FIX) -> ArtifactError:
    """One error for everything wrong with the artifact in `folder`: `problems` one a line, `fix` says what to do."""
    return ArtifactError("\n".join([f"artifact {folder} {what}:", *(f"  - {problem}" for problem in problems), fix]))
