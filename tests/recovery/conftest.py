"""What fault tests share: a run that nothing disturbed, and how often to disturb one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deploy_targets.artifact import check_artifact
from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import METRICS, read_metrics
from tests.command_line import SHORT_RUN, environment_of, hetero_rl, with_settings

NUM_FAULTS = int(os.environ.get("HETERO_RL_TESTS_FAULTS", "1"))
"""Disturbances of each kind; scripts/test_faults.sh sets more."""
SETTINGS = with_settings(*SHORT_RUN, "checkpoint.every_steps=1")
LONGEST_RUN_S = 600
"""On a machine with much else to do."""


class Undisturbed(NamedTuple):
    """What a run that nothing disturbs ends with, and how long it takes."""

    rows: list[dict[str, Any]]
    weights_sha256: str
    seconds: float


def faults(kinds: Iterable[str], what: str) -> list[Any]:
    """Parameters of a test, each a fault by the name `what`, for the log."""
    return [pytest.param(kind, marks=pytest.mark.fault(what.format(kind))) for kind in kinds]


def train(profile: str | Path = "int4-onnx") -> list[str]:
    """The command that is disturbed."""
    return ["train", "--target", str(profile), *SETTINGS, "--run-dir", "run"]


def finished(run: Path, seconds: float = 0.0) -> Undisturbed:
    """The outcome of a finished run, its artifact checked byte by byte. How often an engine was started is no part of it."""
    check_artifact(run / "artifact")
    rows = [{name: value for name, value in row.items() if METRICS[name].exact and name != "publish/rebuilds"} for row in read_metrics(run)]
    return Undisturbed(rows, sha256_of(run / "artifact" / "model.safetensors"), seconds)


def is_undisturbed(run: Path, expected: Undisturbed) -> bool:
    """Whether `run` ended bit for bit as the one that nothing disturbed."""
    return finished(run)[:2] == expected[:2]


def no_half_artifact(run: Path) -> None:
    """An artifact is whole or not there."""
    if (run / "artifact").exists():
        check_artifact(run / "artifact")


def start(folder: Path, command: list[str], **environment: str) -> subprocess.Popen[str]:
    """The run in `folder`, begun by `command` or gone on with."""
    if (folder / "run" / "config.json").is_file():
        command = ["train", "--resume", "--run-dir", "run"]
    return subprocess.Popen(
        [sys.executable, "-m", "hetero_rl", *command],
        cwd=folder, env=environment_of(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def complete(folder: Path, expected: Undisturbed) -> None:
    """Go on until the end, with nothing wrong any more, compare, and clear away."""
    out, _ = start(folder, []).communicate(timeout=LONGEST_RUN_S)
    assert (folder / "run" / "artifact").exists(), out
    assert is_undisturbed(folder / "run", expected), out
    shutil.rmtree(folder / "run")


def undisturbed_run(folder: Path, *command: str | Path) -> Undisturbed:
    """What `command` ends with."""
    begin = time.monotonic()
    result = hetero_rl(*command, cwd=folder, timeout_s=LONGEST_RUN_S)
    assert result.returncode == 0, result.stderr
    return finished(folder / "run", time.monotonic() - begin)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """On `int4-onnx`; an engine in a process of its own computes the same."""
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), *train())


@pytest.fixture
def instants(request: pytest.FixtureRequest) -> random.Random:
    """The same instants for the same test."""
    return random.Random(request.node.name)
