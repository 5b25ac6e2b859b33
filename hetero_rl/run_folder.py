"""The folder of a run: where everything lies, and what the run was made with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from deploy_targets.artifact import write_atomically
from deploy_targets.errors import UsageError
from deploy_targets.hardware import describe_machine, package_versions
from deploy_targets.profile import TargetProfile
from hetero_rl.config import RunConfig
from hetero_rl.errors import RunFolderError

CONFIG_FILE = "config.json"
PROFILE_FILE = "profile.json"
ENVIRONMENT_FILE = "environment.json"
LOCK_FILE = "lock"
MAY_CHANGE = ("loop.num_steps", "checkpoint", "evaluation", "engines", "pool", "ray", "learner.launcher", "learner.num_ranks")
"""Settings that a resumed run may change: they do not reach the steps already taken."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, newest last."""
        return self.path / "checkpoints"

    @property
    def serving(self) -> Path:
        """The folder the engine serves from: the artifact in the making."""
        return self.path / "serving"

    @property
    def artifact(self) -> Path:
        """The exported artifact."""
        return self.path / "artifact"


def default_run_dir(target: str) -> Path:
    """`runs/TARGET-DATE-TIME` under the current folder."""
    return Path("runs") / f"{Path(target).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def create_run(path: Path, config: RunConfig, profile: TargetProfile) -> RunFolder:
    """Make the folder of a new run and write what it is made with.

    Raises:
        RunFolderError: the folder already holds something, or cannot be written.
    """
    check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / PROFILE_FILE, profile.model_dump_json(indent=2).encode())
        write_atomically(path / ENVIRONMENT_FILE, json.dumps(environment(), indent=2).encode())
        write_atomically(path / CONFIG_FILE, config.model_dump_json(indent=2).encode())
    except OSError as error:
        raise RunFolderError(f"run folder {path} cannot be written: {error.strerror}. Give another one with --run-dir") from None
    return RunFolder(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a run folder to this process: two trainers would take turns at each other's files.

    The kernel lets go of the lock when the process ends, however it ends.

    Raises:
        RunFolderError: another process trains there.
    """
    with open(path / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunFolderError(f"run folder {path} is in use by {holder}. Wait for it, stop it, or give another --run-dir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextmanager
def told_of_a_full_disk(path: Path) -> Iterator[None]:
    """Around a run in the folder `path`: raises `OSError` that says what to do where the system says only that there is no space.

    TensorBoard writes in a thread of its own, which gets one line for it in place of a traceback.
    """
    in_thread = threading.excepthook

    def say(raised: threading.ExceptHookArgs) -> None:
        if isinstance(raised.exc_value, OSError) and raised.exc_value.errno == errno.ENOSPC:
            sys.stderr.write(f"warning: a background write failed: {raised.exc_value}\n")
        else:
            in_thread(raised)

    threading.excepthook = say
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        full = f"{error.strerror}: {error.filename or path}"
        raise OSError(f"{full}. Make room, then go on with: hetero-rl train --resume --run-dir {path}") from error
    finally:
        threading.excepthook = in_thread


def check_free(path: Path) -> None:
    """Raises `RunFolderError` when the folder of a new run already holds more than one that was killed before it began; makes nothing."""
    try:
        begun = {name + end for name in (PROFILE_FILE, ENVIRONMENT_FILE, CONFIG_FILE) for end in ("", ".partial")} - {CONFIG_FILE}
        taken = path.exists() and (not path.is_dir() or any(entry.name not in begun for entry in path.iterdir()))
    except OSError as error:
        raise RunFolderError(f"run folder {path} cannot be written: {error.strerror}. Give another one with --run-dir") from None
    if taken:
        holds = "a run" if (path / CONFIG_FILE).exists() else "something else"
        raise RunFolderError(f"run folder {path} already holds {holds}. Continue it with --resume, or give another --run-dir")


def check_output(path: Path | None, option: str) -> None:
    """Before the hours are spent: raises `UsageError` when `path`, given with `option`, could not be written at the end."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give the name of a file or folder to be made")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written: permission denied")


def open_run(path: Path) -> tuple[RunFolder, RunConfig, TargetProfile]:
    """An existing run with the config and profile it was made with. Raises `RunFolderError` when there is none."""
    try:
        config = RunConfig.model_validate_json((path / CONFIG_FILE).read_text("utf-8"))
        profile = TargetProfile.model_validate_json((path / PROFILE_FILE).read_text("utf-8"))
    except OSError as error:
        raise RunFolderError(f"{path} holds no run ({CONFIG_FILE}: {error.strerror})") from None
    except ValueError as error:
        raise RunFolderError(f"{path} holds a run that cannot be read: {error}") from None
    return RunFolder(path), config, profile


def check_same_run(old: RunConfig, new: RunConfig) -> None:
    """A resumed run keeps its recipe. Raises `RunFolderError` naming every setting that differs and matters."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)
    ]
    if changed:
        raise RunFolderError("a resumed run must keep its settings; these differ from the run folder's: " + "; ".join(changed))


def environment() -> dict[str, object]:
    """Versions, machine, git commit and command line of this process."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "machine": asdict(describe_machine()),
        "git_commit": _git_commit(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
