"""What DeepSpeed compiles lies in a folder of this environment, one process at a time, and a guard that a killed one left stops nobody."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from hetero_rl.learner.extensions import FOLDER_VARIABLE, alone_with_extensions


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HETERO_RL_CACHE", str(tmp_path))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    return tmp_path


@pytest.mark.fault("guard of a build that was killed")
def test_the_guard_of_a_killed_build_is_removed() -> None:
    with alone_with_extensions():
        guard = Path(os.environ[FOLDER_VARIABLE]) / "deepspeed_shm_comm" / "lock"
        guard.parent.mkdir()
        guard.touch()
    with alone_with_extensions():
        assert not guard.exists()
    assert FOLDER_VARIABLE not in os.environ


def test_one_process_at_a_time(cache: Path) -> None:
    with alone_with_extensions():
        [lock] = cache.glob("extensions/*/in-use")
        with open(lock, "w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(lock, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_of_the_user_is_left_to_them(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "mine"))
    with alone_with_extensions():
        assert os.environ[FOLDER_VARIABLE] == str(tmp_path / "mine")
    assert not (cache / "extensions").exists()


def test_without_a_cache_torch_does_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETERO_RL_CACHE", "/dev/null/none")
    with alone_with_extensions():
        assert FOLDER_VARIABLE not in os.environ
