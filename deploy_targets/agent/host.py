"""What an agent holds: files by their sha256, and one engine that was started on some of them."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from deploy_targets.catalog import open_engine
from deploy_targets.deltas import unpack
from deploy_targets.engines.wire import answer_generate, answer_score
from deploy_targets.errors import EngineError, UsageError, WeightsError
from deploy_targets.manifest import is_safe_name
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Engine
from deploy_targets.types import WeightFile
from deploy_targets.weights_file import WEIGHTS_FILES

KEPT_WEIGHTS = 2
"""Versions of the weights that are kept: the one that is served, and the one that the next is a difference to."""


class Conflict(EngineError):
    """A request that was right once, or will be, and does not fit what the agent holds now (409)."""


class UnknownFile(Conflict):
    """A file that the agent does not hold (any more)."""


class Host:
    """One engine of one target, in a process of its own, and the files that it is made from."""

    def __init__(self, profile: TargetProfile, folder: Path, max_file_bytes: int) -> None:
        """Nothing is started. `folder` is emptied by `close`; the engine's options are those of `profile`, whatever is sent."""
        self.profile = profile.model_copy(update={"engine": profile.engine.model_copy(update={"process": "own"})})
        self.folder, self._max_file_bytes = folder, max_file_bytes
        self._files, self._serving = folder / "files", folder / "serving"
        self._files.mkdir(parents=True, exist_ok=True)
        self._engine: Engine | None = None
        self._lease = ""
        self._weights: list[str] = []
        self._lock = threading.Lock()

    @property
    def weight_version(self) -> int | None:
        """What is served; None before a start and after a failure."""
        return None if self._engine is None else self._engine.weight_version

    def has(self, sha256: str) -> bool:
        """Whether the file is here."""
        return self._path(sha256).is_file()

    def receive(self, sha256: str, packed: BinaryIO, base: str | None) -> int:
        """Keep what was sent (`deltas.packed`) if it is the file that it is said to be; returns its bytes.

        Raises `UnknownFile` for a base that is not here, `WeightsError` for what is damaged or too long; then nothing is kept.
        """
        path = self._path(sha256)
        if base is not None and not self.has(base):
            raise UnknownFile(f"the file {base} that the difference is to is not here: send it whole")
        handle, name = tempfile.mkstemp(dir=self._files, suffix=".partial")
        os.close(handle)
        try:
            found = unpack(packed, Path(name), None if base is None else self._path(base), self._max_file_bytes)
            if found != sha256:
                raise WeightsError(f"what was sent has the sha256 {found}, not {sha256}: it was damaged on the way, or cut off")
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
        return path.stat().st_size

    def start(self, files: Mapping[str, str], weight_version: int, scheme: Mapping[str, Any]) -> str:
        """Start the engine on a folder of `files`, name -> sha256; whoever had it before has it no more. Returns the lease.

        Raises `UsageError` for names that leave the folder or a scheme that is not this target's, `UnknownFile`, and what the engine
        raises.
        """
        weights = [name for name in files if name in WEIGHTS_FILES]
        unsafe = [name for name in files if not is_safe_name(name)]
        if unsafe or len(weights) != 1:
            what = f"names that leave the folder: {unsafe}" if unsafe else f"{len(weights)} files of weights in place of one"
            raise UsageError(f"an engine cannot be started on {what}")
        own = self.profile.scheme.model_dump(mode="json")
        if dict(scheme) != own:
            different = [
                f"{key}: {own.get(key)!r} here, {scheme.get(key)!r} sent"
                for key in own.keys() | scheme.keys()
                if own.get(key) != scheme.get(key)
            ]
            raise UsageError(f"this agent serves the target {self.profile.name!r}, whose scheme differs: {'; '.join(sorted(different))}")
        with self._lock:
            missing = [name for name, sha256 in files.items() if not self.has(sha256)]
            if missing:
                raise UnknownFile(f"files that were not sent: {', '.join(missing)}")
            self._stop()
            shutil.rmtree(self._serving, ignore_errors=True)
            for name, sha256 in files.items():
                path = self._serving / name
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(self._path(sha256), path)
            self._engine = open_engine(self.profile, self._serving, weight_version)
            self._lease, self._weights = secrets.token_hex(16), [files[weights[0]]]
            self._forget_all_but({*files.values()})
            return self._lease

    def update(self, lease: str, sha256: str, weight_version: int) -> int:
        """Serve the weights `sha256` as `weight_version`, which must be newer than what is served. Raises `Conflict`, `UnknownFile`."""
        with self._lock:
            engine = self._leased(lease)
            if weight_version <= engine.weight_version:
                raise Conflict(f"version {weight_version} is not newer than {engine.weight_version}, which is served: it was sent before")
            if not self.has(sha256):
                raise UnknownFile(f"the weights {sha256} were not sent")
            served = engine.update(WeightFile(self._path(sha256), weight_version))
            dropped, self._weights = self._weights, [*self._weights, sha256][-KEPT_WEIGHTS:]
            for old in set(dropped) - set(self._weights):
                self._path(old).unlink(missing_ok=True)
            return served

    def generate(self, lease: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """`Engine.generate`, as JSON."""
        with self._lock:
            return answer_generate(self._leased(lease), request)

    def score(self, lease: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """`Engine.score`, as JSON."""
        with self._lock:
            return answer_score(self._leased(lease), request)

    def close(self) -> None:
        """Stop the engine and delete every file."""
        with self._lock:
            self._stop()
            shutil.rmtree(self._files, ignore_errors=True)
            shutil.rmtree(self._serving, ignore_errors=True)

    def _leased(self, lease: str) -> Engine:
        if self._engine is None:
            raise Conflict("no engine runs here: start one")
        if not secrets.compare_digest(lease.encode(), self._lease.encode()):
            raise Conflict("another run has started this agent's engine since; give each run agents of its own")
        return self._engine

    def _stop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _forget_all_but(self, kept: set[str]) -> None:
        for path in self._files.iterdir():
            if path.name not in kept and not path.name.endswith(".partial"):
                path.unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        """Raises `UsageError` for what is no sha256: it becomes the name of a file."""
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise UsageError(f"{sha256[:80]!r} is no sha256: 64 hexadecimal digits")
        return self._files / sha256
