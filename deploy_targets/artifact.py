"""A deployable folder and the manifest that says, byte for byte, what lies in it.

    model.safetensors      the weights the engine last served, in the target's checkpoint format (GGUF targets: model.gguf)
    config, graph, ...     engine-native files, tokenizer.json
    probes.st     golden probes: token sequences with the learner's log-probs (`probes.py`)
    fingerprint.json       what the learner knew of every tensor and setting (`fingerprint.py`)
    task_sample.jsonl      optional: prompts on which task accuracy is measured on the target
    manifest.json          written last: an artifact with a manifest is complete
    model.sig              optional: a signature of all of these (`signing.py`)

The hashes find damage and careless edits; they are no signature. Whoever can rewrite the manifest can rewrite its hashes:
require a signature, or compare the sha256 of `manifest.json` itself (`artifact_sha256` in every report) with the one printed at export.
"""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

from deploy_targets.errors import ArtifactError
from deploy_targets.gguf_file import read_gguf
from deploy_targets.hardware import describe_machine, package_versions
from deploy_targets.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    FileRecord,
    Manifest,
    SamplingRecord,
    TaskRecord,
    damaged,
    is_safe_name,
    parse_manifest,
    read_manifest,
    seal,
)  # fmt: skip
from deploy_targets.profile import TargetProfile
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import WEIGHTS_FILES, sha256_of, tensor_layout

__all__ = [
    "MANIFEST_FILE", "PROBES_FILE", "TASK_SAMPLE_FILE", "Manifest", "SamplingRecord", "TaskRecord",
    "check_artifact", "checked_layout", "read_manifest", "write_atomically", "write_manifest",
]  # fmt: skip

PROBES_FILE = "probes.st"
"""A safetensors file that is not named so: vLLM loads every *.safetensors of a folder as weights."""
TASK_SAMPLE_FILE = "task_sample.jsonl"


def write_manifest(
    folder: Path,
    *,
    profile: TargetProfile,
    weight_version: int,
    source_model: str,
    floor: float,
    tolerance: float,
    sampling: SamplingRecord,
    final_gap: float | None = None,
    task: TaskRecord | None = None,
) -> Manifest:
    """Hash every file of `folder` and write its `manifest.json`: the last step of an export.

    Flushes all files to the disk first, then the manifest appears in one rename: a folder that has a manifest is complete.
    Raises `ArtifactError` when the weights or the probes are missing or a file could not be deployed (symlink, odd name).
    """
    names, problems = _list_files(folder)
    names.discard(MANIFEST_FILE + ".partial")
    weights = [name for name in WEIGHTS_FILES if name in names] or [WEIGHTS_FILE]
    problems += [f"{name}: is missing" for name in (weights[0], PROBES_FILE) if name not in names]
    problems += [f"{name}: is a second file of weights beside {weights[0]}" for name in weights[1:]]
    if problems:
        raise damaged(folder, problems, "cannot be sealed", "Write every file of the artifact before its manifest.")
    versions = package_versions()
    fields = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "hetero_rl_version": versions.get("hetero-rl", "unknown"),
        "profile": profile,
        "scheme": profile.scheme.name,
        "weight_version": weight_version,
        "source_model": source_model,
        "floor": floor,
        "tolerance": tolerance,
        "final_gap": final_gap,
        "sampling": sampling,
        "task": task,
        "package_versions": versions,
        "machine": describe_machine(),
        "files": {name: _record(folder / name) for name in sorted(names - {MANIFEST_FILE, SIGNATURE_FILE})},
        "tensors": _tensor_hashes(folder / weights[0]),
    }
    manifest, data = seal(fields)
    write_atomically(folder / MANIFEST_FILE, data)
    return manifest


def check_artifact(folder: Path) -> Manifest:
    """Hold every byte of an artifact against its manifest, before anything is loaded from it.

    Raises one `ArtifactError` naming all of: manifest fields changed, added or removed; files damaged, missing or unknown;
    for the weights, the tensors that differ; symlinks and names that leave the folder.
    """
    manifest, problems = parse_manifest(folder)
    present, unsafe = _list_files(folder)
    problems += unsafe
    if manifest is not None:
        for name in sorted(set(manifest.files) - present):
            problems.append(f"{name}: is missing" if is_safe_name(name) else f"{name!a}: is no name that a file of an artifact may have")
        problems += [f"{name}: is not in the manifest" for name in sorted(present - set(manifest.files) - {MANIFEST_FILE, SIGNATURE_FILE})]
        for name in sorted(present & set(manifest.files)):
            problems += _file_problems(folder, name, manifest)
    if problems or manifest is None:
        raise damaged(folder, problems)
    return manifest


def checked_layout(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The tensors of a safetensors or GGUF file that may be damaged: every problem is an `ArtifactError` that names the file."""
    if path.suffix == ".gguf":
        return read_gguf(path).tensors
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            room = int.from_bytes(file.read(8), "little")
        if size < 8 or room > size - 8:
            raise ArtifactError(f"{path.name}: not a safetensors file: {size} bytes, too short for its header")
        layout = tensor_layout(path)
        beyond = [name for name, (_, _, start, length) in layout.items() if start < 8 + room or length < 0 or start + length > size]
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ArtifactError(f"{path.name}: not a safetensors file: its header does not parse ({type(error).__name__}: {error})") from error
    if beyond:
        raise ArtifactError(f"{path.name}: truncated: the data of {_some(beyond)} lies beyond the end of the file")
    return layout


def _file_problems(folder: Path, name: str, manifest: Manifest) -> list[str]:
    """What is wrong with one file; for the weights, the tensors that differ."""
    record = manifest.files[name]
    try:
        size = (folder / name).stat().st_size
        if size == record.bytes and sha256_of(folder / name) == record.sha256:
            return []
        reason = f"{name}: was changed (" + (f"{size} bytes instead of {record.bytes})" if size != record.bytes else "sha256 differs)")
        if name not in WEIGHTS_FILES:
            return [reason]
        found = _tensor_hashes(folder / name)
    except ArtifactError as error:
        return [str(error)]
    except OSError as error:
        return [f"{name}: cannot be read: {error.strerror}"]
    recorded = manifest.tensors
    differing = [f"{name}: tensor {tensor!r} was changed" for tensor in recorded if found.get(tensor, recorded[tensor]) != recorded[tensor]]
    differing += [f"{name}: tensor {tensor!r} is missing" for tensor in recorded if tensor not in found]
    differing += [f"{name}: tensor {tensor!r} was added" for tensor in found if tensor not in recorded]
    return differing or [f"{reason}; every tensor is intact, so it is the header or the space between tensors"]


def _tensor_hashes(path: Path) -> dict[str, str]:
    """Tensor -> sha256 of "DTYPE [shape]" and its bytes."""
    hashes = {}
    layout = checked_layout(path)
    with open(path, "rb") as file:
        for name, (dtype, shape, start, length) in layout.items():
            digest = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
            file.seek(start)
            while length > 0:
                chunk = file.read(min(length, 1 << 22))
                digest.update(chunk)
                length -= len(chunk) or length
            hashes[name] = digest.hexdigest()
    return hashes


def _list_files(folder: Path) -> tuple[set[str], list[str]]:
    """Relative names of the regular files of `folder`, and a line for everything that may not lie there."""
    if not folder.is_dir():
        raise ArtifactError(f"artifact folder {folder} does not exist")
    names: set[str] = set()
    problems: list[str] = []
    for root, folders, files in os.walk(folder, followlinks=False):
        for entry in sorted([*folders, *files]):
            path = Path(root) / entry
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                problems.append(f"{name}: is a symlink; an artifact holds only regular files")
            elif path.is_file() and is_safe_name(name):
                names.add(name)
            elif not path.is_dir():
                problems.append(f"{name!a}: is no regular file, or its name is not allowed")
    return names, problems


def _record(path: Path) -> FileRecord:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the folder: after a crash there is the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(repr(name) for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
