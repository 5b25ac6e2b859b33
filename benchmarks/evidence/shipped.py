"""Tables of docs/evidence.md about what ships: whether the default of each target keeps its promise, and what its floor would become."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.evidence.cells import ARMS, REGIMES, default_arm
from benchmarks.evidence.estimates import (
    SMOOTHING,
    UNBOUNDED,
    Estimate,
    Run,
    best_rival,
    by_arm_and_seed,
    difference,
    is_rival,
    places,
    shown,
    table_row,
)

AT_STEPS = (40, 80, 120)
"""Where a floor would be measured anew."""


def default_table(runs: Sequence[Run]) -> list[str]:
    """The arm that `auto` ships on each target, held against the promise: tied with the best rival or better, no collapse, above `ptq`.

    Differences are in points, paired by seed. A regime without a rival has no row.
    """
    columns = ["task, target", "regime", "`auto` ships", "seeds", "best rival", "less the best rival", "less `ptq`"]
    columns += ["what `ptq` costs", "collapsed", "kept"]
    lines = [table_row(columns), table_row(["---"] * len(columns))]
    for regime in REGIMES:
        for task, target in places(runs):
            by_arm = by_arm_and_seed(run for run in runs if (run["regime"], run["task"], run["target"]) == (regime, task, target))
            rival = best_rival(by_arm)
            if rival is None:
                continue
            arm = default_arm(target)
            row = [f"{task}, {target}", regime, f"`{arm}`"]
            if arm not in by_arm:
                lines.append(table_row([*row, "0", f"`{rival[0]}` {rival[1].text(100)}", "", "", "", "", "not run"]))
                continue
            to_best, to_ptq = difference(by_arm[arm], by_arm[rival[0]]), difference(by_arm[arm], by_arm.get("ptq", {}))
            cost = difference(by_arm.get("control", {}), by_arm.get("ptq", {}))
            seeds = len(by_arm[arm].keys() & by_arm[rival[0]].keys())
            row += [str(seeds), f"`{rival[0]}` {rival[1].text(100)}", shown(to_best), shown(to_ptq), shown(cost)]
            collapsed = f"{_collapsed(by_arm[arm])} of {len(by_arm[arm])}"
            lines.append(table_row([*row, collapsed, verdict(to_best, to_ptq, cost, arm, by_arm)]))
    return lines


def verdict(to_best: Estimate, to_ptq: Estimate, cost: Estimate, arm: str, by_arm: Mapping[str, Mapping[int, Run]]) -> str:
    """Which part of the promise `arm` breaks, or "yes".

    Tied: the interval of the difference holds 0. Quantizing at the end costs something where the interval of what it costs leaves 0 out;
    there the default must be above it with the whole interval of its own. A collapse counts where some rival had none under those seeds.
    """
    broken = []
    if to_best.mean + (0.0 if math.isnan(to_best.half) else to_best.half) < 0:
        broken.append("behind the best rival")
    if cost.mean - cost.half > 0 and not to_ptq.mean - to_ptq.half > 0:
        broken.append("not above `ptq`")
    seeds = [seed for seed, run in by_arm[arm].items() if run["collapsed"]]
    others = [[found[seed] for seed in seeds if seed in found] for name, found in by_arm.items() if is_rival(name) and not _elsewhere(name)]
    if any(not run["collapsed"] for found in others for run in found):
        broken.append("collapsed where a rival did not")
    return ", ".join(broken) or "yes"


def _elsewhere(arm: str) -> bool:
    """Whether its runs are judged after the fact, by an engine that did not make the rollouts: of them a collapse is not recorded."""
    return ARMS[arm].full_precision_rollouts


def _collapsed(runs: Mapping[int, Run]) -> int:
    return sum(bool(run["collapsed"]) for run in runs.values())


def remeasured_table(runs: Sequence[Run]) -> list[str]:
    """The gap of the same weights on both machines during a run, in floors of its start: what a floor measured anew would be."""
    columns = ["task, target, regime", "arm", *(f"step {step}" for step in AT_STEPS)]
    lines = [table_row(columns), table_row(["---"] * len(columns))]
    for regime in REGIMES:
        for task, target in places(runs):
            by_arm = by_arm_and_seed(run for run in runs if (run["regime"], run["task"], run["target"]) == (regime, task, target))
            for arm in (UNBOUNDED, "recipe"):
                some = [run for run in by_arm.get(arm, {}).values() if len(run["engine_gap"]) >= AT_STEPS[-1]]
                if len(some) < 2 or UNBOUNDED not in by_arm:
                    continue
                at = [
                    Estimate.of([statistics.mean(run["engine_gap"][step - SMOOTHING : step]) / run["floor"] for run in some])
                    for step in AT_STEPS
                ]
                lines.append(table_row([f"{task}, {target}, {regime}", f"`{arm}`", *(estimate.text(digits=2) for estimate in at)]))
    return lines
