"""What is sent to the agents of a pool: each file hashed once, and its difference to the version before made once, however many ask."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from deploy_targets.deltas import packed
from deploy_targets.weights_file import sha256_of

Made = TypeVar("Made")
NUM_KEPT = 2
"""Versions that a difference can start from: what the agents serve now, and the next one from when the first of them serves it."""
NUM_MADE = 64
"""Hashes and differences that are remembered, the last ones; an artifact has fewer files."""


class Outbox:
    """Shared by engines that are updated at once, each by a thread of its own. Its folder goes when it does."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="outbox-")
        self._lock = threading.Lock()
        self._made: dict[Hashable, Future[Any]] = {}
        """What was computed, or is being."""
        self._kept: dict[str, Path] = {}
        """sha256 -> the file, oldest first."""

    def sha256(self, path: Path) -> str:
        """The hash of a file that no one changes in place: another version is another file."""
        status = path.stat()
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        return self._once(identity, lambda: sha256_of(path))

    @property
    def bases(self) -> list[str]:
        """sha256 of the versions that `difference` can start from, the newest first."""
        with self._lock:
            return [*reversed(self._kept)]

    def difference(self, path: Path, sha256: str, base: str) -> BinaryIO | None:
        """The file at `path` as its difference to the kept version `base`, for the caller to close.

        None where that is not less than the file, or the version is kept no more.
        """
        with self._lock:
            old = self._kept.get(base)
        if old is None:
            return None
        try:
            delta = self._once((base, sha256), lambda: self._pack(path, sha256, old))
            return None if delta.stat().st_size >= path.stat().st_size else open(delta, "rb")
        except FileNotFoundError:  # two versions went by meanwhile
            return None

    def keep(self, path: Path, sha256: str) -> None:
        """Hold on to a version that an agent serves, as a start of the differences to come; the oldest is let go."""
        with self._lock:
            kept = self._kept.pop(sha256, None) or self._held(path, sha256)
            self._kept[sha256] = kept
            for old in [*self._kept][:-NUM_KEPT]:
                self._kept.pop(old).unlink()
                for delta in Path(self._folder.name).glob(f"{old}-*"):
                    delta.unlink()

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

    def _held(self, path: Path, sha256: str) -> Path:
        kept = Path(self._folder.name) / sha256
        try:
            os.link(path, kept)
        except OSError:  # on another file system
            shutil.copyfile(path, kept)
        return kept

    def _pack(self, path: Path, sha256: str, old: Path) -> Path:
        delta = Path(self._folder.name) / f"{old.name}-{sha256}"
        with open(delta, "wb") as file:
            for block in packed(path, old):
                file.write(block)
        return delta
