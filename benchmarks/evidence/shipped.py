"""Tables of docs/evidence.md about what ships: the promise of each default, what cheaper forms keep, what a floor would become."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.common import RESULTS
from benchmarks.evidence.cells import ARMS, REGIMES, default_arm
from benchmarks.evidence.estimates import (
    SMOOTHING,
    UNBOUNDED,
    Estimate,
    Run,
    best_rival,
    by_arm_and_seed,
    difference,
    gap_at_equal_reward,
    is_rival,
    places,
    shown,
    table_row,
)

WHOLE = "grey"
FORMS = {"grey": "grey_box", "grey_top": "grey_box_top", "grey_sampled": "grey_box_sampled", "grey_share": "grey_box_share"}
"""Arms of one lambda that differ in the form of the grey box, the whole one first, and their names in constraint_cost.json."""
COSTS = RESULTS / "constraint_cost.json"
ENOUGH = 5
"""Seeds under which a difference of two points can be told from chance."""
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
    """Which part of the promise `arm` breaks, or "yes"; with fewer than `ENOUGH` seeds nothing is kept, only not broken.

    Tied: the interval of the difference holds 0. Quantizing at the end costs something where the interval of what it costs leaves 0 out;
    there the default must be above it with the whole interval of its own. A collapse counts where some rival had none under those seeds.
    """
    broken = []
    if to_best.mean + (0.0 if math.isnan(to_best.half) else to_best.half) < 0:
        broken.append("behind the best rival")
    if cost.mean - cost.half > 0 and not to_ptq.mean - to_ptq.half > 0:
        broken.append("not shown to be above `ptq`")
    seeds = [seed for seed, run in by_arm[arm].items() if run["collapsed"]]
    others = [[found[seed] for seed in seeds if seed in found] for name, found in by_arm.items() if is_rival(name) and not _elsewhere(name)]
    if any(not run["collapsed"] for found in others for run in found):
        broken.append("collapsed where a rival did not")
    return ", ".join(broken) or ("yes" if to_best.count >= ENOUGH else f"nothing against it in {to_best.count} seeds")


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
                if len(some) < 3 or UNBOUNDED not in by_arm:
                    continue
                at = [
                    Estimate.of([statistics.mean(run["engine_gap"][step - SMOOTHING : step]) / run["floor"] for run in some])
                    for step in AT_STEPS
                ]
                lines.append(table_row([f"{task}, {target}, {regime}", f"`{arm}`", *(estimate.text(digits=2) for estimate in at)]))
    return lines


def forms_table(runs: Sequence[Run]) -> list[str]:
    """What cheaper forms of the grey box keep of its effect, which is the fall of the gap below plain GRPO's, at equal reward."""
    cost = {name: case["ratio_median"] for name, case in json.loads(COSTS.read_text("utf-8"))["cases"].items()}
    columns = [
        "task, target, regime",
        "form",
        "seeds",
        "gap / floor",
        "with the whole form",
        "without",
        "effect kept",
        "update, 3M",
        "100M",
    ]
    lines = [table_row(columns), table_row(["---"] * len(columns))]
    for regime in REGIMES:
        for task, target in places(runs):
            by_arm = by_arm_and_seed(run for run in runs if (run["regime"], run["task"], run["target"]) == (regime, task, target))
            for form, case in FORMS.items():
                three = [by_arm.get(arm, {}) for arm in (form, WHOLE, UNBOUNDED)]
                seeds = sorted(set.intersection(*(set(found) for found in three)))
                if not seeds:
                    continue
                gaps = [gap_at_equal_reward([found[seed] for found in three]) for seed in seeds]
                of_form, of_whole, of_none = (statistics.mean(gap[side] for gap in gaps) for side in range(3))
                row = [f"{task}, {target}, {regime}", f"`{form}`", str(len(seeds)), *(f"{gap:.2f}" for gap in (of_form, of_whole, of_none))]
                row.append(f"{100 * (of_none - of_form) / (of_none - of_whole):.0f} %")
                lines.append(table_row([*row, *(f"{cost[key]:.2f} x" if key in cost else "" for key in (f"{case}/tiny", f"{case}/100M"))]))
    return lines
