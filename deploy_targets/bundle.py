"""A bundle: an artifact as one file that travels, and a reader that trusts nothing in it.

    zstd( tar( manifest.json, then every other file in the order of its name ) )

Regular files only, owner 0, mode 0644, time 0: equal artifacts make equal bundles (by one version of zstandard). The manifest comes
first, so that the reader knows the name and the length of everything else before it unpacks a byte of it.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import zstandard

from deploy_targets.artifact import check_artifact
from deploy_targets.errors import ArtifactError
from deploy_targets.manifest import MANIFEST_FILE, SIGNATURE_FILE, Manifest, is_safe_name, read_manifest
from deploy_targets.signing import verify_artifact

MAX_MANIFEST_BYTES = 64 << 20
"""Longest manifest that is read; one line for each tensor and file makes 10 MB of 100,000 tensors."""
MAX_SIGNATURE_BYTES = 16 << 20
_MAX_WINDOW_BYTES = 128 << 20
"""Memory that unpacking may take; what zstd's own tool allows by default."""
_LEVEL = 3
_HEADER_BYTES = 4 * tarfile.BLOCKSIZE
"""Most that tar adds to a file: its header, a longer one where name or length need it (header, records), and the last block's rest."""
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.DIRTYPE: "a folder", tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a named pipe",
}  # fmt: skip
_FIX = "Nothing was unpacked. Copy the bundle again from where it was exported; do not unpack it by other means."


def write_bundle(folder: Path, path: Path) -> None:
    """Pack the artifact in `folder`, its signature too where it has one, into the file `path`, which appears when it is complete.

    Raises `ArtifactError` for an artifact that `check_artifact` refuses.
    """
    names = set(check_artifact(folder).files)
    if (folder / SIGNATURE_FILE).is_file():
        names.add(SIGNATURE_FILE)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
            with (
                compressor.stream_writer(file, closefd=False) as packed,
                tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
            ):
                for name in (MANIFEST_FILE, *sorted(names)):
                    member = tarfile.TarInfo(name)  # its defaults: a regular file, mode 0644, owner 0, time 0
                    with open(folder / name, "rb") as data:
                        member.size = os.fstat(data.fileno()).st_size
                        archive.addfile(member, data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unpack_bundle(path: Path, folder: Path, public_key: Path | None = None) -> Manifest:
    """Unpack the bundle `path` into `folder`, which must not exist and appears when every byte has been held against the manifest.

    With a `public_key`, against the signature too. Raises `ArtifactError` for an archive that is damaged or could do harm, and what
    `check_artifact` and `verify_artifact` raise; then there is no `folder`, and nothing was written outside a temporary folder beside
    it, which is gone.
    """
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent) as scratch:
        content = Path(scratch) / "artifact"
        content.mkdir()
        try:
            _unpack(path, content)
            manifest = check_artifact(content)
            if public_key is not None:
                verify_artifact(content, public_key)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(f"artifact {content}", f"bundle {path}")) from None
        os.replace(content, folder)
    return manifest


class _Source(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


class _Bounded:
    """What the archive unpacks to, for tarfile: an error once it is longer than `left` bytes."""

    def __init__(self, path: Path, source: _Source, left: int) -> None:
        self._path, self._source, self.left = path, source, left

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise _refused(self._path, "it unpacks to more bytes than its manifest declares")
        return data


def _unpack(path: Path, folder: Path) -> None:
    try:
        _unpack_members(path, folder)
    except (FileExistsError, NotADirectoryError):
        raise _refused(path, "one of its files lies where another one needs a folder") from None
    except (tarfile.TarError, zstandard.ZstdError, EOFError, ValueError, OverflowError, IndexError, KeyError) as error:
        # The standard library's reader has no error of its own for every malformed header.
        raise _refused(path, f"it is damaged, or no bundle at all ({error})") from None


def _unpack_members(path: Path, folder: Path) -> None:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    with open(path, "rb") as file, decompressor.stream_reader(file, read_across_frames=True, closefd=False) as unpacked:
        stream = _Bounded(path, unpacked, MAX_MANIFEST_BYTES + _HEADER_BYTES + tarfile.RECORDSIZE)
        with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
            first = archive.next()
            if first is None or first.name != MANIFEST_FILE:
                raise _refused(path, f"it does not begin with {MANIFEST_FILE}")
            _write_member(path, archive, first, folder, MAX_MANIFEST_BYTES)
            files = read_manifest(folder).files
            sizes = {name: record.bytes for name, record in files.items()}
            total = sum(sizes.values())
            if total > (free := shutil.disk_usage(folder).free):
                raise _refused(path, f"it needs {total} bytes, and there are {free} in {folder.parent.parent}")
            stream.left = total + MAX_SIGNATURE_BYTES + (len(sizes) + 1) * _HEADER_BYTES + 2 * tarfile.RECORDSIZE
            found = {MANIFEST_FILE: MANIFEST_FILE}
            for member in iter(archive.next, None):
                found[_check_name(path, member.name, found)] = member.name
                if member.name == SIGNATURE_FILE:
                    _write_member(path, archive, member, folder, MAX_SIGNATURE_BYTES)
                elif member.name not in sizes:
                    raise _refused(path, f"{member.name!a} is not in its manifest")
                else:
                    _write_member(path, archive, member, folder, sizes[member.name])
        while data := stream.read(1 << 16):
            if data.strip(b"\0"):
                raise _refused(path, "it goes on after the end of its archive")
    if missing := sorted(sizes.keys() - set(found.values())):
        raise _refused(path, f"it lacks {', '.join(missing)}")


def _check_name(path: Path, name: str, taken: Mapping[str, str]) -> str:
    """What `name` is where letters of either case are one; raises `ArtifactError` where it leaves the folder or is among `taken`."""
    if not is_safe_name(name):
        raise _refused(path, f"{name!a} is no name that a file of an artifact may have")
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    if folded in taken:
        other = taken[folded]
        both = (
            f"{name} is in it twice" if other == name else f"{name} and {other} are one file where upper and lower case are not told apart"
        )
        raise _refused(path, both)
    return folded


def _write_member(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, most_bytes: int) -> None:
    """Write one member below `folder`. Raises `ArtifactError` for anything but a regular file of at most `most_bytes`, all of it there."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise _refused(path, f"{member.name!a} is {_KINDS.get(member.type, 'no regular file')}; an artifact holds only regular files")
    if member.size > most_bytes:
        raise _refused(path, f"{member.name} has {member.size} bytes where {most_bytes} are declared or allowed")
    tarfile.data_filter(member, str(folder))
    source = archive.extractfile(member)
    assert source is not None, "a regular file has data"
    target = folder / member.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, open(target, "xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        if file.tell() != member.size:
            raise _refused(path, f"it ends in the middle of {member.name}")


def _refused(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"bundle {path} is refused: {reason}. {_FIX}")
