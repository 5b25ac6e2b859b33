"""Any byte of an artifact that changes is found before anything is loaded, and named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deploy_targets.artifact import (
    MANIFEST_FILE,
    PROBES_FILE,
    Manifest,
    SamplingRecord,
    TaskRecord,
    check_artifact,
    checked_layout,
    read_manifest,
    write_manifest,
)
from deploy_targets.errors import ArtifactError
from deploy_targets.profile import GateSpec, load_profile
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import sha256_of, tensor_layout

PACKED, SCALE = "model.layers.0.mlp.up_proj.weight_packed", "model.layers.0.mlp.up_proj.weight_scale"


def seal(folder: Path, **changes: object) -> Manifest:
    fields: dict[str, object] = {
        "profile": load_profile("fake"),
        "weight_version": 7,
        "source_model": "tiny",
        "floor": 0.01,
        "tolerance": 0.02,
        "sampling": SamplingRecord(max_tokens=16, stop_token_ids=(2, 5)),
        "final_gap": 0.012,
        "task": TaskRecord(accuracy=0.5, num_problems=10, reward="exact"),
        **changes,
    }
    return write_manifest(folder, **fields)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "artifact"
    (made / "graph").mkdir(parents=True)
    rng = np.random.default_rng(0)
    weights = {
        PACKED: rng.integers(-(2**31), 2**31 - 1, size=(8, 4), dtype=np.int32),
        SCALE: rng.random((8, 2), dtype=np.float32),
        "model.norm.weight": np.ones(32, np.float16),
    }
    save_file(weights, made / WEIGHTS_FILE)
    save_file({"any": np.zeros(1, np.float32)}, made / PROBES_FILE)
    (made / "config.json").write_text('{"vocab_size": 32}')
    (made / "graph" / "decoder.onnx").write_bytes(b"graph")
    seal(made)
    return made


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def refused(folder: Path, *fragments: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        check_artifact(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)
    return str(caught.value)


def test_an_untouched_artifact_is_read_back_whole(folder: Path) -> None:
    manifest = check_artifact(folder)
    assert manifest == read_manifest(folder)
    assert manifest.weight_version == 7
    assert manifest.profile == load_profile("fake")
    assert set(manifest.files) == {WEIGHTS_FILE, PROBES_FILE, "config.json", "graph/decoder.onnx"}
    assert manifest.files[WEIGHTS_FILE].sha256 == sha256_of(folder / WEIGHTS_FILE)
    assert set(manifest.tensors) == {PACKED, SCALE, "model.norm.weight"}
    assert set(manifest.entry_sha256) == set(Manifest.model_fields) - {"entry_sha256"}


def test_infinite_gates_survive(folder: Path) -> None:
    profile = load_profile("fake").model_copy(update={"gates": GateSpec(kl_k3_fail=float("inf"))})
    seal(folder, profile=profile)
    assert check_artifact(folder).profile.gates.kl_k3_fail == float("inf")


@pytest.mark.parametrize("tensor", [PACKED, SCALE])
def test_a_flipped_byte_names_its_tensor(folder: Path, tensor: str) -> None:
    _, _, start, length = tensor_layout(folder / WEIGHTS_FILE)[tensor]
    for offset in (start, start + length - 1):
        flip(folder / WEIGHTS_FILE, offset)
        message = refused(folder, f"{WEIGHTS_FILE}: tensor {tensor!r} was changed")
        assert message.count("tensor ") == 1
        flip(folder / WEIGHTS_FILE, offset)
    check_artifact(folder)


def test_every_byte_of_the_weights_header_counts(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    for offset in range(min(start for _, _, start, _ in tensor_layout(path).values())):
        flip(path, offset)
        refused(folder, WEIGHTS_FILE)
        flip(path, offset)
    check_artifact(folder)


def test_a_renamed_tensor_is_missing_and_added(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes().replace(b"weight_scale", b"weight_scalf"))
    refused(folder, f"tensor {SCALE!r} is missing", "tensor 'model.layers.0.mlp.up_proj.weight_scalf' was added")


def test_a_tensor_with_another_dtype_is_named(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes().replace(b'"I32"', b'"U32"'))
    refused(folder, f"tensor {PACKED!r} was changed")


@pytest.mark.parametrize("name", ["config.json", "graph/decoder.onnx", PROBES_FILE])
def test_a_flipped_byte_names_its_file(folder: Path, name: str) -> None:
    flip(folder / name, -1)
    refused(folder, f"{name}: was changed")


def test_all_damage_is_listed_at_once(folder: Path) -> None:
    flip(folder / "config.json", 3)
    (folder / "graph" / "decoder.onnx").unlink()
    (folder / "notes.txt").write_text("hello")
    flip(folder / WEIGHTS_FILE, -1)
    refused(
        folder, "config.json: was changed", "graph/decoder.onnx: is missing", "notes.txt: is not in the manifest", f"{WEIGHTS_FILE}: tensor"
    )


def lines_of(folder: Path) -> list[bytes]:
    return (folder / MANIFEST_FILE).read_bytes().splitlines(keepends=True)


def edits(line: bytes) -> list[bytes]:
    """Ways in which one line of JSON may be changed: first letter, last letter, indent, removal, repetition."""
    positions = [i for i, byte in enumerate(line) if chr(byte).isalnum()]
    changed = [line[:i] + (b"0" if line[i : i + 1] != b"0" else b"1") + line[i + 1 :] for i in (positions[:1] + positions[-1:])]
    return [*changed, b" " + line, b"", line + line]


def test_every_changed_line_of_the_manifest_is_caught_and_its_field_named(folder: Path) -> None:
    lines = lines_of(folder)
    fields = set(Manifest.model_fields)
    for number, line in enumerate(lines):
        for edited in edits(line):
            (folder / MANIFEST_FILE).write_bytes(b"".join([*lines[:number], edited, *lines[number + 1 :]]))
            message = refused(folder, MANIFEST_FILE)
            if 0 < number < len(lines) - 1:
                assert any(repr(field) in message for field in fields), (number, edited, message)
    (folder / MANIFEST_FILE).write_bytes(b"".join(lines))
    check_artifact(folder)


def rewrite(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Edit the manifest as its own writer would format it."""
    entries = json.loads((folder / MANIFEST_FILE).read_text())
    change(entries)
    (folder / MANIFEST_FILE).write_text(json.dumps(entries, indent=2) + "\n")


@pytest.mark.parametrize("field", sorted(set(Manifest.model_fields) - {"entry_sha256"}))
def test_a_field_changed_or_removed_is_named(folder: Path, field: str) -> None:
    original = (folder / MANIFEST_FILE).read_bytes()
    rewrite(folder, lambda entries: entries.update({field: "other"}))
    refused(folder, f"field {field!r}, or its hash in entry_sha256, was changed")
    (folder / MANIFEST_FILE).write_bytes(original)
    rewrite(folder, lambda entries: entries.pop(field))
    refused(folder, f"field {field!r} is missing")


def test_an_optional_field_removed_with_its_hash_is_named(folder: Path) -> None:
    def change(entries: dict[str, object]) -> None:
        del entries["final_gap"]
        del entries["entry_sha256"]["final_gap"]  # type: ignore[attr-defined]

    rewrite(folder, change)
    refused(folder, "field 'final_gap' is missing")


def test_an_added_field_is_named(folder: Path) -> None:
    rewrite(folder, lambda entries: entries.update({"approved": True}))
    refused(folder, "field 'approved' was added")


def test_a_repeated_key_is_caught(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(path.read_text().replace('  "weight_version": 7,', '  "weight_version": 9,\n  "weight_version": 7,'))
    refused(folder, "'weight_version', was rewritten")


def test_a_newer_format_says_so(folder: Path) -> None:
    rewrite(folder, lambda entries: entries.update({"format_version": 99}))
    refused(folder, "format_version 99 is newer", "upgrade")


def test_deleted_and_extra_files(folder: Path) -> None:
    for name in (WEIGHTS_FILE, PROBES_FILE, "config.json"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(folder, f"{name}: is missing")
        (folder / name).write_bytes(data)
    (folder / "graph" / "extra.bin").write_bytes(b"")
    refused(folder, "graph/extra.bin: is not in the manifest")


def test_symlinks_are_refused_even_to_the_right_bytes(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    refused(folder, "config.json: is a symlink")


def test_a_symlinked_manifest_or_subfolder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "graph").rename(tmp_path / "graph")
    (folder / "graph").symlink_to(tmp_path / "graph")
    refused(folder, "graph: is a symlink", "graph/decoder.onnx: is missing")
    (folder / MANIFEST_FILE).rename(tmp_path / "m.json")
    (folder / MANIFEST_FILE).symlink_to(tmp_path / "m.json")
    refused(folder, "manifest.json: is a symlink")


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "graph/../config.json", "./config.json"])
def test_names_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.json").write_text("{}")

    def change(entries: dict[str, object]) -> None:
        files = entries["files"]
        assert isinstance(files, dict)
        files[name] = files["config.json"]

    rewrite(folder, change)
    refused(folder, f"{name!r}: is no name that a file of an artifact may have", "field 'files'")


def test_a_fifo_is_refused_without_being_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    refused(folder, "'pipe': is no regular file")


@pytest.mark.parametrize("size", [0, 5, 8, 40, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, WEIGHTS_FILE)
    with pytest.raises(ArtifactError, match=WEIGHTS_FILE):
        checked_layout(path)


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b"3", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b"[" * 100_000,
     b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}',
     b'{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["x", 8]}}',
     b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-40, 8]}}', b"\xff\xfe"],
)  # fmt: skip
def test_malformed_headers_are_artifact_errors(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ArtifactError, match=r"bad\.safetensors"):
        checked_layout(path)


def test_a_header_that_claims_exabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match="too short for its header"):
        checked_layout(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"entry_sha256": 3}', b'{"files": {"a": 1}}']
)
def test_malformed_manifests_are_artifact_errors(folder: Path, text: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(text)
    refused(folder, MANIFEST_FILE)


def test_no_manifest_and_no_folder(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    refused(folder, "manifest.json: is missing", "did not finish")
    refused(tmp_path / "nowhere", "does not exist")
    refused(folder / "config.json", "does not exist")


def test_an_artifact_without_probes_or_weights_cannot_be_sealed(folder: Path) -> None:
    (folder / PROBES_FILE).unlink()
    (folder / WEIGHTS_FILE).unlink()
    (folder / "link").symlink_to(folder / "config.json")
    with pytest.raises(ArtifactError) as caught:
        seal(folder)
    for fragment in (f"{PROBES_FILE}: is missing", f"{WEIGHTS_FILE}: is missing", "link: is a symlink"):
        assert fragment in str(caught.value)
