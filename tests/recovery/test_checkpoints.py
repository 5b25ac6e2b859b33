"""Checkpoints of a real run, cut off at every tenth of every file: the one before is used, and the run ends as if nothing had been."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hetero_rl.checkpoint import checkpoints, newest_whole
from tests.recovery.conftest import NUM_FAULTS, Undisturbed, complete, train, undisturbed_run

pytestmark = pytest.mark.timeout(1800)
Survived = Callable[[], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Undisturbed]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder / "run", undisturbed_run(folder, *train(), "--set", "checkpoint.keep=3")


@pytest.mark.fault("newest checkpoint cut off at a tenth of one of its files")
def test_the_one_before_is_found(run: tuple[Path, Undisturbed], tmp_path: Path, survived: Survived) -> None:
    folder = Path(shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints"))
    *_, older, newest = checkpoints(folder)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(files) >= 3
    for path in files:
        whole = path.read_bytes()
        for tenth in range(10):
            warnings: list[str] = []
            os.truncate(path, len(whole) * tenth // 10)
            assert newest_whole(folder, warnings.append) == older
            assert "step-000004 is damaged" in warnings[0]
            path.write_bytes(whole)
            survived()
    assert newest_whole(folder, pytest.fail) == newest


@pytest.mark.fault("resume with a newest checkpoint that is cut off")
def test_a_resume_leaves_it_aside(run: tuple[Path, Undisturbed], tmp_path: Path, instants: random.Random, survived: Survived) -> None:
    for _ in range(1 if NUM_FAULTS < 10 else 5):
        copy = Path(shutil.copytree(run[0], tmp_path / "run"))
        shutil.rmtree(copy / "artifact")
        newest = checkpoints(copy / "checkpoints")[-1]
        path = instants.choice([path for path in sorted(newest.rglob("*")) if path.is_file()])
        os.truncate(path, path.stat().st_size * instants.randrange(10) // 10)
        complete(tmp_path, run[1])
        survived()
