"""The log of faults and its table: what is noted, what is added up, and that docs/reliability.md says what the lines say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.faults import OUT, PAGE, ROOT, read, table, with_table
from tests.command_line import environment_of

SUITE = """
import pytest
from tests.fault_log import pytest_collection_modifyitems, pytest_runtest_logreport, survived


@pytest.mark.fault("passes")
@pytest.mark.parametrize("case", [1, 2])
def test_passes(case):
    pass


@pytest.mark.fault("fails at the third")
def test_fails(survived):
    survived()
    survived()
    raise AssertionError


@pytest.mark.fault("many")
def test_many(survived):
    survived(1000)


@pytest.mark.fault("cannot begin")
def test_cannot_begin(no_such_fixture):
    pass


@pytest.mark.fault("skipped")
def test_skipped():
    pytest.skip("why not")


def test_unmarked():
    pass
"""


def test_the_page_is_made_from_the_log() -> None:
    page = PAGE.read_text("utf-8")
    assert with_table(page, read(OUT)) == page, "out of date: run python -m benchmarks.faults report"
    assert all(line["survived"] == line["tried"] for line in read(OUT) if "fault" in line)


def test_a_log_of_tests_that_pass_and_fail(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(SUITE.partition("\n\n\n")[0].replace("import pytest\n", ""))
    (tmp_path / "test_suite.py").write_text(SUITE)
    log = tmp_path / "log.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", str(tmp_path), "--rootdir", str(tmp_path)],
        cwd=tmp_path, env=environment_of({"HETERO_RL_TESTS_FAULTS_LOG": str(log), "PYTHONPATH": str(ROOT)}), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    lines = sorted((line["fault"], line["tried"], line["survived"]) for line in read(log))
    assert lines == [("cannot begin", 1, 0), ("fails at the third", 3, 2), ("many", 1000, 1000), ("passes", 1, 1), ("passes", 1, 1)]


def test_the_table_adds_up() -> None:
    run = {
        "command": "python -m pytest",
        "date": "2026-01-01",
        "commit": "0123456789",
        "machine": {"cpu": "x", "num_cores": 2},
        "versions": {},
    }
    lines = [run, *({"fault": "a", "tried": 3, "survived": 2, "test": f"f.py::t[{i}]"} for i in range(2)), {"exit_code": 1, "hours": 1.0}]
    made = table(json.loads(json.dumps(lines)))
    assert "| a | 6 | 4 | `f.py`, `t` |" in made
    assert made[-1].startswith("- 2026-01-01, commit 0123456: `python -m pytest`. x, 2 cores")
