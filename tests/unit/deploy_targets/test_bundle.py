"""A bundle unpacks to the artifact it was made of, or to nothing at all."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from deploy_targets import bundle as bundle_module
from deploy_targets.artifact import MANIFEST_FILE, check_artifact
from deploy_targets.bundle import unpack_bundle, write_bundle
from deploy_targets.errors import ArtifactError
from deploy_targets.manifest import SIGNATURE_FILE
from tests.artifacts import make_artifact
from tests.conftest import TinyModels

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="module")
def artifact(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "artifact"
    make_artifact(tiny_models("qwen3"), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "out.tar.zst"
    write_bundle(artifact, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members_of(path: Path) -> Members:
    with tarfile.open(fileobj=io.BytesIO(unzipped(path))) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def unzipped(path: Path) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()


def packed(members: Iterable[tuple[tarfile.TarInfo, bytes]], tail: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return zstandard.ZstdCompressor().compress(buffer.getvalue() + tail)


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, linkname, len(data)
    return info, data


def refused(data: bytes, tmp_path: Path, *fragments: str) -> None:
    """The archive is one clear error, and neither a folder nor anything else is left behind, inside or outside."""
    place = tmp_path / "place"
    place.mkdir()
    path = place / "bad.tar.zst"
    path.write_bytes(data)
    around = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError) as caught:
        unpack_bundle(path, place / "artifact")
    for fragment in (str(path), *fragments):
        assert fragment in str(caught.value), caught.value
    assert ".partial" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == around


def test_a_bundle_unpacks_to_the_artifact(artifact: Path, bundle: Path, tmp_path: Path) -> None:
    manifest = unpack_bundle(bundle, tmp_path / "artifact")
    assert contents(tmp_path / "artifact") == contents(artifact)
    assert manifest == check_artifact(artifact)
    assert list(tmp_path.iterdir()) == [tmp_path / "artifact"]


def test_equal_artifacts_make_equal_bundles(artifact: Path, bundle: Path, tmp_path: Path) -> None:
    unpack_bundle(bundle, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    write_bundle(tmp_path / "copy", tmp_path / "again.tar.zst")
    assert (tmp_path / "again.tar.zst").read_bytes() == bundle.read_bytes()
    found = [member for member, _ in members_of(bundle)]
    assert found[0].name == MANIFEST_FILE
    assert [member.name for member in found[1:]] == sorted(set(contents(artifact)) - {MANIFEST_FILE})
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isreg()) for m in found} == {(0, 0, 0, "", "", 0o644, True)}


def test_a_signature_travels(artifact: Path, bundle: Path, tmp_path: Path) -> None:
    unpack_bundle(bundle, tmp_path / "signed")
    (tmp_path / "signed" / SIGNATURE_FILE).write_bytes(b"a signature")
    write_bundle(tmp_path / "signed", tmp_path / "signed.tar.zst")
    unpack_bundle(tmp_path / "signed.tar.zst", tmp_path / "there")
    assert (tmp_path / "there" / SIGNATURE_FILE).read_bytes() == b"a signature"


def test_a_damaged_artifact_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    unpack_bundle(bundle, tmp_path / "artifact")
    (tmp_path / "artifact" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json: was changed"):
        write_bundle(tmp_path / "artifact", tmp_path / "out.tar.zst")
    assert list(tmp_path.iterdir()) == [tmp_path / "artifact"]


@pytest.mark.parametrize(
    "name", ["/etc/evil", "../evil", "a/../../evil", "./config.json", "a//b", "a\\b", "a\nb", "x" * 256, ".", "é\u202e"]
)
def test_names_that_leave_the_folder(bundle: Path, tmp_path: Path, name: str) -> None:
    data = packed([*members_of(bundle), member(name, b"evil")])
    refused(data, tmp_path, "no name that a file of an artifact may have")


@pytest.mark.parametrize(
    ("kind", "word"),
    [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"), (tarfile.CHRTYPE, "device"), (tarfile.BLKTYPE, "device"),
     (tarfile.FIFOTYPE, "named pipe"), (tarfile.DIRTYPE, "folder"), (tarfile.CONTTYPE, "no regular file")],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_only_regular_files(bundle: Path, tmp_path: Path, kind: bytes, word: str, first: bool) -> None:
    """In the place of the manifest, and in that of a file which the manifest names."""
    name = MANIFEST_FILE if first else "config.json"
    members = [member(name, b"", kind, "../../outside") if info.name == name else (info, data) for info, data in members_of(bundle)]
    refused(packed(members), tmp_path, word, name)


def test_a_file_behind_a_link(bundle: Path, tmp_path: Path) -> None:
    """The classic: a link to a folder outside, then a file below it."""
    members = [*members_of(bundle)[:1], member("out", b"", tarfile.SYMTYPE, str(tmp_path)), member("out/evil", b"evil")]
    refused(packed(members), tmp_path, "'out' is not in its manifest")


def test_names_twice_or_of_another_case(bundle: Path, tmp_path: Path) -> None:
    members = members_of(bundle)
    (tmp_path / "one").mkdir()
    refused(packed([*members, members[-1]]), tmp_path / "one", "is in it twice")
    (tmp_path / "two").mkdir()
    refused(packed([*members, members[0]]), tmp_path / "two", f"{MANIFEST_FILE} is in it twice")
    (tmp_path / "three").mkdir()
    refused(packed([*members, member("CONFIG.json")]), tmp_path / "three", "CONFIG.json and config.json are one file")


def test_files_that_the_manifest_does_not_know(bundle: Path, tmp_path: Path) -> None:
    refused(packed([*members_of(bundle), member("extra.bin")]), tmp_path, "'extra.bin' is not in its manifest")


def test_a_file_that_is_missing(bundle: Path, tmp_path: Path) -> None:
    refused(packed([pair for pair in members_of(bundle) if pair[0].name != "config.json"]), tmp_path, "it lacks config.json")


def test_the_manifest_comes_first(bundle: Path, tmp_path: Path) -> None:
    refused(packed(members_of(bundle)[::-1]), tmp_path, f"does not begin with {MANIFEST_FILE}")


def test_more_bytes_than_declared(bundle: Path, tmp_path: Path) -> None:
    members = [member(info.name, data + b"\0") if info.name == "config.json" else (info, data) for info, data in members_of(bundle)]
    refused(packed(members), tmp_path, "config.json has")


def test_a_changed_byte_is_named(bundle: Path, tmp_path: Path) -> None:
    members = [member(info.name, data[:-1] + b" ") if info.name == "config.json" else (info, data) for info, data in members_of(bundle)]
    refused(packed(members), tmp_path, "is not what was exported", "config.json: was changed")


def test_a_changed_manifest_is_named(bundle: Path, tmp_path: Path) -> None:
    (info, manifest), *rest = members_of(bundle)
    entries = json.loads(manifest)
    entries["tolerance"] = 1.0
    refused(packed([member(info.name, (json.dumps(entries, indent=2) + "\n").encode()), *rest]), tmp_path, "field 'tolerance'")


@pytest.mark.parametrize("position", ["before the manifest", "after it", "after the end", "in a header"])
def test_a_decompression_bomb_is_bounded(bundle: Path, tmp_path: Path, position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes of zeros in a megabyte: no more of it is unpacked than the manifest declares."""
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 1 << 20)
    monkeypatch.setattr(bundle_module, "MAX_SIGNATURE_BYTES", 1 << 20)
    members = members_of(bundle)
    size = 64 << 20
    if position == "before the manifest":
        data = packed([member(MANIFEST_FILE, bytes(size))])
    elif position == "after it":
        data = packed([members[0], member(SIGNATURE_FILE, bytes(size)), *members[1:]])
    elif position == "after the end":
        data = packed(members, tail=bytes(size))
    else:
        info, manifest = members[0]
        info.pax_headers = {"comment": "x" * size}
        data = packed([(info, manifest), *members[1:]])
    read = bytes_read(monkeypatch)
    refused(
        data,
        tmp_path,
        "more bytes than its manifest declares" if position in ("after the end", "in a header") else "are declared or allowed",
    )
    assert sum(read) < 8 << 20


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the length of everything that is unpacked from now on."""
    lengths: list[int] = []
    original: Callable[..., bytes] = bundle_module._Bounded.read

    def read(self: Any, size: int) -> bytes:
        data = original(self, size)
        lengths.append(len(data))
        return data

    monkeypatch.setattr(bundle_module._Bounded, "read", read)
    return lengths


def test_a_manifest_that_declares_more_than_there_is_room_for(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(bundle.read_bytes(), tmp_path, "bytes, and there are 1000 in")


def test_a_window_that_wants_gigabytes_of_memory(bundle: Path, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    refused(compressor.compress(unzipped(bundle)) + compressor.flush(), tmp_path, "damaged, or no bundle at all")


def test_something_after_the_end(bundle: Path, tmp_path: Path) -> None:
    refused(packed(members_of(bundle), tail=b"\0" * 20480 + b"hidden"), tmp_path, "goes on after the end")


def test_something_after_the_compressed_end(bundle: Path, tmp_path: Path) -> None:
    refused(bundle.read_bytes() + b"hidden", tmp_path, "damaged, or no bundle at all")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9])
def test_a_truncated_bundle(bundle: Path, tmp_path: Path, share: float) -> None:
    data = bundle.read_bytes()
    refused(data[: int(share * len(data))], tmp_path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a zip", b"{}", zstandard.ZstdCompressor().compress(b"not a tar" * 200)])
def test_what_is_no_bundle(tmp_path: Path, data: bytes) -> None:
    refused(data, tmp_path)
