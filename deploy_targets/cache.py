"""What takes long to make and never changes, kept between runs: in $HETERO_RL_CACHE, else in the user's cache folder."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CACHE_VARIABLE = "HETERO_RL_CACHE"


def cache_folder() -> Path:
    """$HETERO_RL_CACHE, else `hetero-rl` under $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetero-rl"


def kept(kind: str, key: object, make: Callable[[Path], None]) -> list[Path]:
    """The files that `make` writes into the folder it is given; those of an earlier call with an equal `key`, where there was one.

    `key` is anything that json can write. Two processes may make the same at once: the first to finish is kept. Where the cache cannot
    be written, what was made lies in a temporary folder until the process ends.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    folder = cache_folder() / kind / digest[:32]
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        except OSError:
            made = folder = Path(_until_exit(tempfile.mkdtemp(prefix="hetero-rl-")))
        try:
            make(made)
            if made != folder:
                with suppress(OSError):  # another process was faster
                    os.replace(made, folder)
        finally:
            if made != folder:
                shutil.rmtree(made, ignore_errors=True)
    return sorted(folder.iterdir())


def _until_exit(folder: str) -> str:
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
