"""What DeepSpeed compiles on its first start: once for each environment, and never waited for in vain.

torch guards a build by a file that the builder removes. One that was killed leaves it there, and every later start waits for ever; and
two environments that share a folder compile anew in turns, as their paths differ. So this environment has a folder of its own, and who
builds holds a lock that the system takes back from the dead: a guard that lies there then is nobody's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from deploy_targets.cache import cache_folder

FOLDER_VARIABLE = "TORCH_EXTENSIONS_DIR"
"""Where torch compiles; a folder that the user gives is left to them."""


@contextmanager
def alone_with_extensions() -> Iterator[None]:
    """Around what compiles or loads: other processes of this environment wait. Without a cache that can be written, torch's own way."""
    if os.environ.get(FOLDER_VARIABLE):
        yield
        return
    environment = hashlib.sha256("\n".join([sys.prefix, sys.version, torch.__version__]).encode()).hexdigest()[:16]
    folder = cache_folder() / "extensions" / environment
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "in-use", "w")  # noqa: SIM115 - closed below
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_guards(folder)
        os.environ[FOLDER_VARIABLE] = str(folder)
        try:
            yield
        finally:
            del os.environ[FOLDER_VARIABLE]


def remove_guards(folder: Path) -> None:
    """Of builds that were killed: torch names them `lock`, one in the folder of each extension."""
    for guard in folder.glob("*/lock"):
        guard.unlink(missing_ok=True)
