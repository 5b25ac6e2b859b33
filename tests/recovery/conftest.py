"""What fault tests share: a run that nothing disturbed, and how often to disturb one."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deploy_targets.artifact import check_artifact
from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import METRICS, read_metrics
from tests.command_line import SHORT_RUN, hetero_rl, with_settings

NUM_FAULTS = int(os.environ.get("HETERO_RL_TESTS_FAULTS", "1"))
"""Disturbances of each kind; scripts/test_faults.sh sets more."""
LOG = os.environ.get("HETERO_RL_TESTS_FAULTS_LOG")
"""JSON lines of what was tried and survived go here, for docs/reliability.md."""
SETTINGS = with_settings(*SHORT_RUN, "checkpoint.every_steps=1")


class Undisturbed(NamedTuple):
    """What a run that nothing disturbs ends with, and how long it takes."""

    rows: list[dict[str, Any]]
    weights_sha256: str
    seconds: float


def train(profile: str | Path = "int4-onnx") -> list[str]:
    """The command that is disturbed."""
    return ["train", "--target", str(profile), *SETTINGS, "--run-dir", "run"]


def finished(run: Path, seconds: float = 0.0) -> Undisturbed:
    """The outcome of a finished run, its artifact checked byte by byte."""
    check_artifact(run / "artifact")
    rows = [{name: value for name, value in row.items() if METRICS[name].exact} for row in read_metrics(run)]
    return Undisturbed(rows, sha256_of(run / "artifact" / "model.safetensors"), seconds)


def is_undisturbed(run: Path, expected: Undisturbed) -> bool:
    """Whether `run` ended bit for bit as the one that nothing disturbed."""
    return finished(run)[:2] == expected[:2]


def no_half_artifact(run: Path) -> None:
    """An artifact is whole or not there."""
    if (run / "artifact").exists():
        check_artifact(run / "artifact")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """On `int4-onnx`; an engine in a process of its own computes the same."""
    folder, begin = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    result = hetero_rl(*train(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return finished(folder / "run", time.monotonic() - begin)


@pytest.fixture
def instants(request: pytest.FixtureRequest) -> random.Random:
    """The same instants for the same test."""
    return random.Random(request.node.name)


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes how many faults were tried and survived, once a test has seen them all."""

    def note(fault: str, num_tried: int) -> None:
        if LOG:
            with open(LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps({"fault": fault, "tried": num_tried, "survived": num_tried, "test": request.node.nodeid}) + "\n")

    return note
