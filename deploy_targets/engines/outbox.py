"""What is sent to the agents of a pool: each file hashed once, and its difference to the version before made once, however many ask."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from deploy_targets.deltas import packed

NUM_HELD = 2
"""Versions of the weights that differences are made of: the next one, and the one before it, which the agents have."""
NUM_MADE = 64
"""Hashes and differences that are remembered, the last ones; an artifact has fewer files."""

Made = TypeVar("Made")


class Outbox:
    """Shared by engines that are started and updated at once, each by a thread of its own. Its folder goes when it does."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="outbox-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._lock = threading.Lock()
        self._made: dict[Hashable, Future[Any]] = {}
        """What was computed, or is being."""
        self._held: dict[str, Path] = {}
        """sha256 -> the file, oldest first."""

    def sha256(self, path: Path) -> str:
        """The hash of a file. Another version is another file: none is changed in place."""
        with open(path, "rb") as file:
            return self._sha256(file)

    def hold(self, path: Path) -> tuple[str, Path]:
        """The weights at `path` as they are now: (sha256, where they stay, whatever is published under that path meanwhile)."""
        with open(path, "rb") as file:
            sha256 = self._sha256(file)
            with self._lock:
                held = self._held.pop(sha256, None) or self._taken(path, file, sha256)
                self._held[sha256] = held
                for old in [*self._held][:-NUM_HELD]:
                    self._held.pop(old).unlink(missing_ok=True)
                    for delta in self.folder.glob(f"{old}-*"):
                        delta.unlink(missing_ok=True)
        return sha256, held

    def bases(self, sha256: str) -> list[str]:
        """The sha256 of other versions that are held, the newest first."""
        with self._lock:
            return [other for other in reversed(self._held) if other != sha256]

    def difference(self, path: Path, sha256: str, base: str) -> BinaryIO | None:
        """The file at `path` as its difference to the version `base`, for the caller to close.

        None where that is not less than the file, or the version is held no more.
        """
        with self._lock:
            old = self._held.get(base)
        if old is None:
            return None
        try:
            delta = self._once((base, sha256), lambda: self._pack(path, sha256, old))
            return None if delta.stat().st_size >= path.stat().st_size else open(delta, "rb")
        except FileNotFoundError:  # other versions came by meanwhile
            return None

    def _sha256(self, file: BufferedReader) -> str:
        status = os.fstat(file.fileno())
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        return self._once(identity, lambda: hashlib.file_digest(file, "sha256").hexdigest())

    def _once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, called by the first who asks; the others wait. What it raises is raised for all of them, and forgotten."""
        with self._lock:
            is_first = key not in self._made
            made = self._made.setdefault(key, Future())
            for old in [*self._made][:-NUM_MADE]:
                self._made.pop(old)
        if is_first:
            try:
                made.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._made.pop(key, None)
                made.set_exception(error)
        result: Made = made.result()
        return result

    def _taken(self, path: Path, file: BufferedReader, sha256: str) -> Path:
        held = self.folder / sha256
        try:
            os.link(path, held)
        except OSError:  # on another file system
            held.touch()
        if not os.path.samestat(held.stat(), os.fstat(file.fileno())):
            # Not the file that was opened: a copy is wanted, or another version came under its name.
            held.unlink()
            file.seek(0)
            with open(held, "wb") as copy:
                shutil.copyfileobj(file, copy)
        return held

    def _pack(self, path: Path, sha256: str, old: Path) -> Path:
        delta = self.folder / f"{old.name}-{sha256}"
        with open(delta, "wb") as file:
            for block in packed(path, old):
                file.write(block)
        return delta
