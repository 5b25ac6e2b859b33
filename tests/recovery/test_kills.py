"""SIGKILL of the trainer and of its engine, at random and amid what they do: each resume ends as the run that nothing disturbed."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hetero_rl.errors import RunFolderError
from hetero_rl.run_folder import check_free, open_run
from tests.faulty_engine import faulty_target
from tests.recovery.conftest import (
    LONGEST_RUN_S,
    NUM_FAULTS,
    Undisturbed,
    complete,
    faults,
    is_undisturbed,
    no_half_artifact,
    start,
    train,
    undisturbed_run,
)

pytestmark = pytest.mark.timeout(600 + 180 * NUM_FAULTS)
Survived = Callable[[], None]
SOME = max(1, NUM_FAULTS // 8)


def kill_at_random(
    folder: Path, command: list[str], expected: Undisturbed, num_kills: int, instants: random.Random, survived: Survived
) -> None:
    """At instants from start-up to export; a run that gets to its end in between is compared, and the next one begins."""
    done = 0
    while done < num_kills:
        process = start(folder, command)
        try:
            out, _ = process.communicate(timeout=instants.uniform(0, 1.1) * expected.seconds)
            assert process.returncode == 0, out
            assert is_undisturbed(folder / "run", expected)
            shutil.rmtree(folder / "run")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            no_half_artifact(folder / "run")
            done += 1
            survived()
    if (folder / "run").exists():
        complete(folder, expected)


TARGETS = {"int4-onnx": NUM_FAULTS} if NUM_FAULTS < 10 else {"int4-onnx": NUM_FAULTS, "int4-vllm": SOME}


@pytest.mark.parametrize("target", faults(TARGETS, "SIGKILL of the trainer at a random instant, `{}`"))
def test_the_trainer_is_killed(target: str, undisturbed: Undisturbed, tmp_path: Path, instants: random.Random, survived: Survived) -> None:
    if target != "int4-onnx":
        (tmp_path / "undisturbed").mkdir()
        undisturbed = undisturbed_run(tmp_path / "undisturbed", *train(target))
    kill_at_random(tmp_path, train(target), undisturbed, TARGETS[target], instants, survived)


WRITTEN = {
    "checkpoint": "checkpoints/*.partial",
    "publish": "serving/*.next*",
    "export": "artifact.partial",
}
"""What lies in a run folder while it is written."""


@pytest.mark.parametrize("what", faults(["checkpoint"] if NUM_FAULTS < 10 else WRITTEN, "SIGKILL of the trainer amid its {}"))
def test_the_trainer_is_killed_while_it_writes(
    what: str, undisturbed: Undisturbed, tmp_path: Path, instants: random.Random, survived: Survived
) -> None:
    for _ in range(SOME):
        process = start(tmp_path, train())
        seen: set[Path] = set()
        while not seen and process.poll() is None:
            time.sleep(0.002)
            seen |= set((tmp_path / "run").glob(WRITTEN[what]))
        # Amid it, not always at its first byte.
        time.sleep(instants.uniform(0, 0.02))
        process.kill()
        out, _ = process.communicate()
        assert process.returncode == -9, out
        no_half_artifact(tmp_path / "run")
        complete(tmp_path, undisturbed)
        survived()


@pytest.mark.parametrize(
    "call", faults(["generate"] if NUM_FAULTS < 10 else ["generate", "score", "update"], "SIGKILL of the engine amid its `{}`")
)
def test_the_engine_is_killed_amid_a_call(
    call: str, undisturbed: Undisturbed, tmp_path: Path, instants: random.Random, survived: Survived
) -> None:
    """A publish starts another engine and goes on. Amid a rollout the run ends with one clear error and its checkpoint."""
    target, environment = faulty_target(tmp_path)
    num_calls = {"generate": 12, "score": 5, "update": 4}[call]
    for _ in range(SOME):
        nth = instants.randrange(num_calls)
        process = start(tmp_path, train(target), **environment, ENGINE_FAULT=f"{call}:{nth}:killed")
        out, _ = process.communicate(timeout=LONGEST_RUN_S)
        assert "Traceback" not in out, out
        if process.returncode == 0:
            assert "killed by SIGKILL" in out or "died during" in out, out
            assert is_undisturbed(tmp_path / "run", undisturbed)
            shutil.rmtree(tmp_path / "run")
        else:
            assert process.returncode == 1, out
            assert "died during" in out, out
            no_half_artifact(tmp_path / "run")
            if (tmp_path / "run").exists():
                complete_with(environment, tmp_path, undisturbed)
        survived()


def complete_with(environment: dict[str, str], folder: Path, expected: Undisturbed) -> None:
    """Go on where the engine finds its module, and has no fault."""
    out, _ = start(folder, [], **environment).communicate(timeout=LONGEST_RUN_S)
    assert is_undisturbed(folder / "run", expected), out
    shutil.rmtree(folder / "run")


@pytest.mark.fault("SIGKILL of the engine at a random instant")
def test_the_engine_is_killed(undisturbed: Undisturbed, tmp_path: Path, instants: random.Random, survived: Survived) -> None:
    profile = tmp_path / "own.toml"
    profile.write_text('name = "own"\ndescription = "its engine can be killed"\nextends = "int4-onnx"\nengine.process = "own"\n')
    done = 0
    while done < max(1, NUM_FAULTS * 2 // 5):
        process = start(tmp_path, train(profile))
        engine = engine_of(process)
        try:
            out, _ = process.communicate(timeout=instants.uniform(0, 0.25) * undisturbed.seconds)
        except subprocess.TimeoutExpired:
            if engine is not None and engine.is_running():
                engine.kill()
                done += 1
                survived()
            out, _ = process.communicate(timeout=LONGEST_RUN_S)
            assert "Traceback" not in out, out
        if process.returncode == 0:
            assert is_undisturbed(tmp_path / "run", undisturbed)
            shutil.rmtree(tmp_path / "run")
        else:
            assert process.returncode == 1, out
            assert "engine 'onnxruntime'" in out, out
    if (tmp_path / "run").exists():
        complete(tmp_path, undisturbed)


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
