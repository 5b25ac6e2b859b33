"""SIGKILL at random instants, of the trainer and of its engine: every resume goes on, and ends as the run that nothing disturbed."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hetero_rl.errors import RunFolderError
from hetero_rl.run_folder import check_free, open_run
from tests.command_line import environment_of
from tests.recovery.conftest import NUM_FAULTS, Undisturbed, is_undisturbed, no_half_artifact, train

pytestmark = pytest.mark.timeout(120 + 60 * NUM_FAULTS)
Survived = Callable[[str, int], None]


def start(folder: Path, profile: str | Path = "int4-onnx") -> subprocess.Popen[str]:
    """The run in `folder`, begun or gone on with."""
    has_begun = (folder / "run" / "config.json").is_file()
    command = ["train", "--resume", "--run-dir", "run"] if has_begun else train(profile)
    return subprocess.Popen(
        [sys.executable, "-m", "hetero_rl", *command],
        cwd=folder, env=environment_of({}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def complete(folder: Path, expected: Undisturbed) -> None:
    """Go on until the end, and compare."""
    out, _ = start(folder).communicate(timeout=300)
    assert is_undisturbed(folder / "run", expected), out
    shutil.rmtree(folder / "run")


def test_the_trainer_is_killed(undisturbed: Undisturbed, tmp_path: Path, instants: random.Random, survived: Survived) -> None:
    """At instants from start-up to export; a run that gets to its end in between is compared, and the next one begins."""
    num_kills = 0
    while num_kills < NUM_FAULTS:
        process = start(tmp_path)
        try:
            out, _ = process.communicate(timeout=instants.uniform(0, 1.1) * undisturbed.seconds)
            assert process.returncode == 0, out
            assert is_undisturbed(tmp_path / "run", undisturbed)
            shutil.rmtree(tmp_path / "run")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            num_kills += 1
            no_half_artifact(tmp_path / "run")
    complete(tmp_path, undisturbed)
    survived("trainer killed by SIGKILL, at any instant", num_kills)


@pytest.fixture
def own_process(tmp_path: Path) -> Path:
    """`int4-onnx` with its engine in a process that can be killed by itself."""
    path = tmp_path / "own.toml"
    path.write_text('name = "own"\ndescription = "its engine can be killed"\nextends = "int4-onnx"\nengine.process = "own"\n')
    return path


def test_the_engine_is_killed(
    undisturbed: Undisturbed, own_process: Path, tmp_path: Path, instants: random.Random, survived: Survived
) -> None:
    """While it generates, scores or takes new weights: the run ends with one clear error and its checkpoint, and goes on from there."""
    num_kills = 0
    while num_kills < NUM_FAULTS:
        process = start(tmp_path, own_process)
        engine = engine_of(process)
        try:
            out, _ = process.communicate(timeout=instants.uniform(0, 0.6) * undisturbed.seconds)
        except subprocess.TimeoutExpired:
            if engine is not None and engine.is_running():
                engine.kill()
                num_kills += 1
            out, _ = process.communicate(timeout=120)
            assert "Traceback" not in out, out
        if process.returncode == 0:
            assert is_undisturbed(tmp_path / "run", undisturbed)
            shutil.rmtree(tmp_path / "run")
        else:
            assert process.returncode == 1, out
            assert "engine 'onnxruntime'" in out, out
    if (tmp_path / "run").exists():
        complete(tmp_path, undisturbed)
    survived("engine killed by SIGKILL while it generates, scores or takes weights", num_kills)


def engine_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    """The engine's process, once there is one; None where the run ended before."""
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if "deploy_targets.engines.process" in child.cmdline():
                    return child
            except psutil.Error:
                continue
        time.sleep(0.02)
    return None


def test_a_run_that_was_killed_before_it_began_can_begin_again(tmp_path: Path) -> None:
    for name in ("profile.json", "environment.json.partial"):
        (tmp_path / name).write_text("{")
    with pytest.raises(RunFolderError, match="holds no run"):
        open_run(tmp_path)
    check_free(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="something else"):
        check_free(tmp_path)
