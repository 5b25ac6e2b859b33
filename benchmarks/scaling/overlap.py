"""What `one_step_off` gains and costs, from the records of `benchmarks.schedule` and of the evidence suite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.evidence.report import Estimate, read_runs

CELL = {"task": "addition", "target": "q2_k-llamacpp", "arm": "recipe"}


def paired(runs: Sequence[dict[str, Any]]) -> tuple[list[int], Estimate]:
    """Seeds, and deployed accuracy one step off less that in turns, seed by seed: a mean with its 95 % interval."""
    by_seed: dict[str, dict[int, float]] = {"one_step_off": {}, "on_policy": {}}
    for run in runs:
        if run["regime"] in by_seed and all(run[key] == value for key, value in CELL.items()):
            by_seed[run["regime"]][run["seed"]] = run["deployed_accuracy"]
    ahead, in_turns = by_seed["one_step_off"], by_seed["on_policy"]
    seeds = sorted(ahead.keys() & in_turns.keys())
    return seeds, Estimate.of([ahead[seed] - in_turns[seed] for seed in seeds])


def text(results: Path = RESULTS) -> str:
    """The generated part of docs/scale.md."""
    seeds, difference = paired(read_runs(results / "evidence.jsonl"))
    lines = [
        f"Deployed accuracy at equal steps, one step off less in turns, paired over {len(seeds)} seeds (`recipe`, addition, Q2_K): "
        f"{difference.text(100, sign='+')} points, the interval being 95 %. So five seeds show no loss; one of up to "
        f"{100 * max(0.0, difference.half - difference.mean):.1f} points they cannot exclude."
    ]
    if not (results / "schedule.json").is_file():
        return "\n".join([*lines, "", "What it gains in time has no record yet: `python -m benchmarks.schedule` makes it."])
    record = json.loads((results / "schedule.json").read_text("utf-8"))
    lines += [
        "",
        "| run on two cores | s per step | step in turns / this step |",
        "| --- | --- | --- |",
    ]
    for name, case in record["cases"].items():
        seconds, ratio = (f"{case[p + 'median']:.2f} ({case[p + 'low']:.2f} to {case[p + 'high']:.2f})" for p in ("", "ratio_"))
        lines.append(f"| {name} | {seconds} | {ratio} |")
    return "\n".join(lines)
