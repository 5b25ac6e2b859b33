"""The benchmark records: what lies in benchmarks/results is whole, and the light scripts run and write one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.common import RESULTS, Record, in_turns, measurement

ROOT = RESULTS.parent.parent
SCRIPTS = (
    "arithmetic",
    "attention",
    "constraint_cost",
    "delta_updates",
    "publish",
    "publish_targets",
    "publish_vs_restart",
    "quantizers",
    "ranks",
    "rollout",
    "scaling",
    "schedule",
    "step_vs_trl",
    "verification",
)


def load(path: Path) -> Record:
    record = Record.model_validate_json(path.read_text("utf-8"))
    assert record.name in SCRIPTS
    assert f"benchmarks.{record.name}" in record.command
    headline = record.cases[record.headline]
    assert (headline.runs, headline.median, headline.ratio_median) == (record.runs, record.median, record.ratio_median)
    assert record.machine["cpu"]
    assert record.machine["num_cores"] >= 1
    assert "torch" in record.versions
    return record


def test_shipped_results() -> None:
    """Every file is the full run of the script whose name it bears."""
    for path in RESULTS.glob("*.json"):
        record = load(path)
        assert record.name == path.stem
        assert not record.quick, f"{path} is a quick run; measure again without --quick"
        assert len(record.runs) >= (3 if record.name == "publish_targets" else 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arithmetic", "attention", "constraint_cost", pytest.param("scaling", marks=pytest.mark.variant)])
def test_quick_run(name: str, tmp_path: Path) -> None:
    out = tmp_path / "nested" / "record.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    record = load(out)
    assert record.quick
    assert record.name == name
    assert len(record.runs) == 2
    assert all(case.ratio_low is not None and case.ratio_low > 0 for case in record.cases.values())
    assert all(name in done.stdout for name in record.cases)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_explained(name: str) -> None:
    assert f"python -m benchmarks.{name}" in (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    assert (ROOT / "benchmarks" / f"{name}.py").is_file() or (ROOT / "benchmarks" / name / "__main__.py").is_file()


def test_measurement() -> None:
    found = measurement([2.0, 4.0, 3.0], "s", baseline=[8.0, 4.0, 6.0], ratio_of="theirs / ours", inverse=True)
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert (found.ratio_median, found.ratio_low, found.ratio_high) == (2.0, 1.0, 4.0)
    assert measurement([2.0], "s", baseline=[4.0], ratio_of="ours / theirs").ratio_median == 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"median": 2.5},
        {"low": 1.0},
        {"ratio_median": 3.5},
        {"ratio_of": None},
        {"baseline_runs": [1.0]},
        {"runs": []},
    ],
)
def test_figures_that_do_not_follow_from_the_runs_are_refused(change: dict[str, object]) -> None:
    good = measurement([2.0, 4.0], "s", baseline=[1.0, 1.0], ratio_of="ours / theirs").model_dump()
    with pytest.raises(ValidationError):
        type(measurement([1.0], "s")).model_validate({**good, **change})
    assert json.loads(json.dumps(good))["ratio_high"] == 4.0


def test_turns_are_taken_one_at_a_time_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []
    sides = {side: lambda side=side: order.append(side) or len(order) for side in ("a", "b")}
    found = in_turns(sides, rounds=2, warmups=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": [3, 6], "b": [4, 5]}
