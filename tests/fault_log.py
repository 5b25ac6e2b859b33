"""A log of faults that tests cause: one JSON line a test, for docs/reliability.md (`python -m benchmarks.faults`).

A test is marked `@pytest.mark.fault("what is done")`. It stands for one fault, or for as many as it notes with the fixture `survived`, and
for one that was not survived where it fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest

LOG = "HETERO_RL_TESTS_FAULTS_LOG"
"""Environment variable: the file that gets the lines."""
_FAULT, _SURVIVED = "fault", "survived"


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes one fault that was survived, or so many, of a test that causes several."""

    def note(num: int = 1) -> None:
        request.node.user_properties.append((_SURVIVED, num))

    return note


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Reports carry no markers, but properties."""
    for item in items:
        if (mark := item.get_closest_marker("fault")) is not None:
            item.user_properties.append((_FAULT, mark.args[0]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Where the test runs: the process that only collects what xdist's workers report writes nothing."""
    path, properties = os.environ.get(LOG), report.user_properties
    fault = next((value for name, value in properties if name == _FAULT), None)
    if not path or fault is None or hasattr(report, "node") or report.skipped:
        return
    is_over = report.when == "call" or report.failed
    if is_over:
        noted = sum(value for name, value in properties if name == _SURVIVED)
        num_survived = noted or int(report.passed)
        line = {"fault": fault, "tried": num_survived + int(report.failed), "survived": num_survived, "test": report.nodeid[:200]}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
