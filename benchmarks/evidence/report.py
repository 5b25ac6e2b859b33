"""Tables and curves of docs/evidence.md, made from the JSON lines alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.cells import ARMS, REGIMES, SWEEP, TASKS
from benchmarks.evidence.estimates import (
    UNBOUNDED,
    Estimate,
    Run,
    best_rival,
    by_arm_and_seed,
    deployed,
    difference,
    gap_at_equal_reward,
    late_reward,
    pairs,
    places,
    read_runs,
    shown,
    table_row,
)
from benchmarks.evidence.shipped import default_table, forms_table, remeasured_table
from deploy_targets.charts import line_chart

MARKER = "evidence"


def accuracy_table(runs: Sequence[Run]) -> list[str]:
    """Deployed accuracy of each arm, the learner's own in brackets; the best of a column in bold, with the number of collapsed runs."""
    columns = places(runs)
    lines = [table_row(["arm", *(f"{task}, {target}" for task, target in columns)]), table_row(["---"] * (1 + len(columns)))]
    cells: dict[tuple[str, tuple[str, str]], list[Run]] = {}
    for run in runs:
        cells.setdefault((run["arm"], (run["task"], run["target"])), []).append(run)
    accuracy = {key: Estimate.of([deployed(run) for run in some]) for key, some in cells.items()}
    for arm in (arm for arm in ARMS if any(key[0] == arm for key in cells)):
        row = [f"`{arm}`"]
        for place in columns:
            some = cells.get((arm, place))
            if some is None:
                row.append("")
                continue
            others = [estimate.mean for (other, there), estimate in accuracy.items() if there == place and other != "control"]
            text = accuracy[arm, place].text(100)
            text = f"**{text}**" if arm != "control" and accuracy[arm, place].mean == max(others) else text
            learner = Estimate.of([run["learner_accuracy"] for run in some])
            collapsed = sum(run["collapsed"] for run in some)
            row.append(f"{text} ({100 * learner.mean:.1f})" + (f" †{collapsed}" if collapsed else ""))
        lines.append(table_row(row))
    return lines


def difference_table(runs: Sequence[Run]) -> list[str]:
    """Our arms less the best rival of the same task and target, paired by seed, in points; and their gap beside plain GRPO's.

    Deployed accuracy, and the reward of the engine's own samples over the last steps, which many more responses go into. The gap is
    held against `grpo`, whose floor is the same; a learner that computes with the rounded weights measures another gap, from a floor
    of its own, and has none here.
    """
    columns = ["task, target", "best rival", "arm", "accuracy", "sampled reward", "gap at equal reward / floor"]
    lines = [table_row(columns), table_row(["---"] * len(columns))]
    for task, target in places(runs):
        by_arm = by_arm_and_seed(run for run in runs if (run["task"], run["target"]) == (task, target))
        if (found := best_rival(by_arm)) is None:
            continue
        best, accuracy = found
        for arm in (arm for arm in ARMS if arm in by_arm and ARMS[arm].ours):
            rewards = Estimate.of([late_reward(ours) - late_reward(rival) for ours, rival in pairs(by_arm[arm], by_arm[best])])
            row = [f"{task}, {target}", f"`{best}` {accuracy.text(100)}", f"`{arm}`"]
            row += [shown(difference(by_arm[arm], by_arm[best])), shown(rewards)]
            comparable = {} if ARMS[arm].measures_the_rest else by_arm.get(UNBOUNDED, {})
            gaps = [gap_at_equal_reward(pair) for pair in pairs(by_arm[arm], comparable)]
            ours, theirs = (Estimate.of([gap[side] for gap in gaps]) for side in (0, 1))
            lines.append(table_row([*row, f"{ours.text(digits=2)} against {theirs.text(digits=2)}" if gaps else ""]))
    return lines


def curves(runs: Sequence[Run], folder: Path) -> list[str]:
    """One chart for each regime, task and target: deployed accuracy by step, the mean over seeds; returns the lines that show them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for regime in (regime for regime in REGIMES if any(run["regime"] == regime for run in runs)):
        for task, target in places(run for run in runs if run["regime"] == regime):
            here = [run for run in runs if (run["regime"], run["task"], run["target"]) == (regime, task, target)]
            series = {}
            for arm in (arm for arm in ARMS if ARMS[arm].drawn):
                some = [run["curve"] for run in here if run["arm"] == arm]
                if some:
                    steps = [point[0] for point in some[0]]
                    series[arm] = (steps, [100 * statistics.mean(curve[i][1] for curve in some) for i in range(len(steps))])
            if not series:
                continue
            name = f"{regime}-{task}-{target}.svg"
            chart = line_chart(series, title=f"{task} for {target}, {regime}", x_label="step", y_label="deployed accuracy, %")
            (folder / name).write_text(standalone(chart), "utf-8")
            lines.append(f"![Deployed accuracy by step: {task}, {target}, {regime}](images/evidence/{name})")
    return lines


def sweep(runs: Sequence[Run], folder: Path) -> list[str]:
    """By the bound of the constraint: deployed accuracy, and the step at which a run first had 90 % of the best accuracy of its seed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for task, target in places(runs):
        here = [
            run
            for run in runs
            if (run["task"], run["target"], run["regime"]) == (task, target, "on_policy") and run["arm"] in (*SWEEP, UNBOUNDED)
        ]
        arms = [arm for arm in (*SWEEP, UNBOUNDED) if any(run["arm"] == arm for run in here)]
        if len(arms) < 3:
            continue
        best = {
            seed: max(point[1] for run in here if run["seed"] == seed for point in run["curve"]) for seed in {run["seed"] for run in here}
        }
        lines += [
            "",
            f"{task}, {target}:",
            "",
            table_row(["bound / floor", "deployed", "sampled reward", "learner", "gap / floor", "steps to 90 % of the best"]),
            table_row(["---"] * 6),
        ]
        points: dict[float, float] = {}
        for arm in arms:
            some = [run for run in here if run["arm"] == arm]
            figures = [Estimate.of([value(run) for run in some]) for value in (deployed, late_reward, _learner, _gap_over_floor)]
            steps = [next((point[0] for point in run["curve"] if point[1] >= 0.9 * best[run["seed"]]), math.inf) for run in some]
            bound = ARMS[arm].tolerance
            reached = f"{statistics.median(steps):.0f}" if math.isfinite(statistics.median(steps)) else "not reached"
            shown_figures = [*(figure.text(100) for figure in figures[:3]), figures[3].text(digits=2)]
            lines.append(table_row(["none" if bound is None else f"{bound:g}", *shown_figures, reached]))
            if bound is not None:
                points[bound] = 100 * figures[0].mean
        unbounded = [100 * run["deployed_accuracy"] for run in here if run["arm"] == UNBOUNDED]
        name = f"tolerance-{task}-{target}.svg"
        chart = line_chart(
            {"bounded": (list(points), list(points.values()))}, title=f"{task} for {target}", x_label="tolerance / floor",
            y_label="deployed accuracy, %", horizontal={"no bound": statistics.mean(unbounded)} if unbounded else None, markers=True,
        )  # fmt: skip
        (folder / name).write_text(standalone(chart), "utf-8")
        lines += ["", f"![Deployed accuracy by tolerance: {task}, {target}](images/evidence/{name})"]
    return lines


def _learner(run: Run) -> float:
    return float(run["learner_accuracy"])


def _gap_over_floor(run: Run) -> float:
    return float(run["gap"] / run["floor"])


def standalone(chart: str) -> str:
    """A chart as a file of its own."""
    return chart if "xmlns=" in chart else chart.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)


def report(runs: Sequence[Run], docs: Path) -> str:
    """The generated part of docs/evidence.md; writes the charts beside it."""
    lines = [
        f"{len(runs)} runs; accuracy in %, mean over seeds with its 95 % interval. † counts runs that collapsed.",
        "",
        "| arm | what it is |",
        "| --- | --- |",
    ]
    lines += [f"| `{name}` | {arm.what} |" for name, arm in ARMS.items() if any(run["arm"] == name for run in runs)]
    lines += ["", "### What `auto` ships, cell by cell", "", *default_table(runs)]
    for regime in (regime for regime in REGIMES if any(run["regime"] == regime for run in runs)):
        here = [run for run in runs if run["regime"] == regime]
        lines += ["", f"### {regime}", "", "Deployed accuracy, and the learner's own in brackets:", "", *accuracy_table(here)]
        lines += ["", "Against the best rival:", "", *difference_table(here)]
    images = docs / "images" / "evidence"
    swept = sweep(runs, images)
    lines += ["", "### By tolerance", *swept] if swept else []
    lines += ["", "### Cheaper forms of the grey box", "", *forms_table(runs)]
    lines += ["", "### A floor measured anew", "", *remeasured_table(runs)]
    return "\n".join([*lines, "", "### Curves", "", *curves(runs, images)])


def write_report(results: Path, page: Path) -> None:
    """Put the tables between the markers of `page`. Raises `SystemExit` where it has lost them."""
    begin, end = f"<!-- {MARKER}: made by python -m benchmarks.evidence report -->\n", f"<!-- end of {MARKER} -->\n"
    before, found, rest = page.read_text("utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise SystemExit(f"{page} has lost the markers of {MARKER!r}; put them back")
    runs = [run for run in read_runs(results) if run["arm"] in ARMS and run["task"] in TASKS]
    page.write_text(before + begin + "\n" + report(runs, page.parent) + "\n\n" + end + after, "utf-8")
