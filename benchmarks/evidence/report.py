"""Tables and curves of docs/evidence.md, made from the JSON lines alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.cells import ARMS, REGIMES, SWEEP, TASKS
from deploy_targets.charts import line_chart

Run = dict[str, Any]
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
"""Student's t at 97.5 %, for 1, 2, ... degrees of freedom."""
SMOOTHING = 10
"""Steps that a reward is averaged over where runs are compared at equal reward."""
LATE_STEPS = 20
MARKER = "evidence"
UNBOUNDED = "grpo"
"""The arm without a bound: a sweep of the tolerance ends in it, and gaps are held against its own."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds; `half` is half of its 95 % interval, NaN for a single seed."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """By Student's t; NaN for all of it where one value is NaN."""
        if any(math.isnan(value) for value in values):
            return cls(math.nan, math.nan, len(values))
        if len(values) < 2:
            return cls(values[0] if values else math.nan, math.nan, len(values))
        t = T_95[min(len(values) - 2, len(T_95) - 1)]
        return cls(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values)), len(values))

    def text(self, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
        """`61.2 ± 1.5`, without the interval for a single seed."""
        mean = f"{scale * self.mean:{sign}.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {scale * self.half:.{digits}f}"


def read_runs(path: Path) -> list[Run]:
    """Every finished run; of a cell that was run again, the last."""
    return list({run["cell"]: run for run in map(json.loads, path.read_text("utf-8").splitlines())}.values())


def gap_at_equal_reward(runs: Sequence[Run]) -> list[float]:
    """Each run's engine gap over its floor at the reward that all of `runs` reached: a policy that collapsed has a small gap as well."""
    curves = [_smoothed(run["reward"]) for run in runs]
    shared = min(max(curve) for curve in curves)
    found = []
    for run, curve in zip(runs, curves, strict=True):
        if ARMS[run["arm"]].full_precision_rollouts:
            found.append(math.nan)  # its engine was not the target
            continue
        step = next(i for i, reward in enumerate(curve) if reward >= shared)
        gaps = run["engine_gap"][max(0, step - SMOOTHING + 1) : step + 1]
        found.append(statistics.mean(gaps) / run["floor"] if run["floor"] > 0 else math.nan)
    return found


def late_reward(run: Run) -> float:
    """Mean reward of what the deployed engine sampled over the last steps; NaN where another engine made the rollouts."""
    return math.nan if ARMS[run["arm"]].full_precision_rollouts else statistics.mean(run["reward"][-LATE_STEPS:])


def _smoothed(values: Sequence[float]) -> list[float]:
    return [statistics.mean(values[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(values))]


def places(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """The pairs of task and target, in the order of their first run."""
    return list(dict.fromkeys((run["task"], run["target"]) for run in runs))


def accuracy_table(runs: Sequence[Run]) -> list[str]:
    """Deployed accuracy of each arm, the learner's own in brackets; the best of a column in bold, with the number of collapsed runs."""
    columns = places(runs)
    lines = [_row(["arm", *(f"{task}, {target}" for task, target in columns)]), _row(["---"] * (1 + len(columns)))]
    cells: dict[tuple[str, tuple[str, str]], list[Run]] = {}
    for run in runs:
        cells.setdefault((run["arm"], (run["task"], run["target"])), []).append(run)
    deployed = {key: Estimate.of([run["deployed_accuracy"] for run in some]) for key, some in cells.items()}
    for arm in (arm for arm in ARMS if any(key[0] == arm for key in cells)):
        row = [f"`{arm}`"]
        for place in columns:
            some = cells.get((arm, place))
            if some is None:
                row.append("")
                continue
            others = [estimate.mean for (other, there), estimate in deployed.items() if there == place and other != "control"]
            text = deployed[arm, place].text(100)
            text = f"**{text}**" if arm != "control" and deployed[arm, place].mean == max(others) else text
            learner = Estimate.of([run["learner_accuracy"] for run in some])
            collapsed = sum(run["collapsed"] for run in some)
            row.append(f"{text} ({100 * learner.mean:.1f})" + (f" †{collapsed}" if collapsed else ""))
        lines.append(_row(row))
    return lines


def difference_table(runs: Sequence[Run]) -> list[str]:
    """Our arms less the best rival of the same task and target, paired by seed, in points; and their gap beside plain GRPO's.

    Deployed accuracy, and the reward of the engine's own samples over the last steps, which many more responses go into. The best
    rival is the best by mean of those that ran under the most seeds, chosen on the same runs: against it, an interval that only just
    leaves out 0 says little. The gap is held against `grpo`, whose floor is the same; a learner that computes with the rounded weights
    measures another gap, from a floor of its own, and has none here.
    """
    lines = [_row(["task, target", "best rival", "arm", "accuracy", "sampled reward", "gap at equal reward / floor"]), _row(["---"] * 6)]
    for task, target in places(runs):
        here = [run for run in runs if (run["task"], run["target"]) == (task, target) and run["arm"] != "control"]
        by_arm: dict[str, dict[int, Run]] = {}
        for run in here:
            by_arm.setdefault(run["arm"], {})[run["seed"]] = run
        rivals = {arm: Estimate.of([_deployed(run) for run in found.values()]) for arm, found in by_arm.items() if not ARMS[arm].ours}
        if not rivals:
            continue
        best = max(rivals, key=lambda arm: (rivals[arm].count, rivals[arm].mean))
        for arm in (arm for arm in ARMS if arm in by_arm and ARMS[arm].ours):
            pairs = _pairs(by_arm[arm], by_arm[best])
            difference = Estimate.of([_deployed(ours) - _deployed(rival) for ours, rival in pairs])
            rewards = Estimate.of([late_reward(ours) - late_reward(rival) for ours, rival in pairs])
            row = [f"{task}, {target}", f"`{best}` {rivals[best].text(100)}", f"`{arm}`", _shown(difference), _shown(rewards)]
            comparable = {} if ARMS[arm].measures_the_rest else by_arm.get(UNBOUNDED, {})
            gaps = [gap_at_equal_reward(pair) for pair in _pairs(by_arm[arm], comparable)]
            ours, theirs = (Estimate.of([gap[side] for gap in gaps]) for side in (0, 1))
            lines.append(_row([*row, f"{ours.text(digits=2)} against {theirs.text(digits=2)}" if gaps else ""]))
    return lines


def _pairs(ours: dict[int, Run], theirs: dict[int, Run]) -> list[tuple[Run, Run]]:
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def _shown(difference: Estimate) -> str:
    return "" if math.isnan(difference.mean) else difference.text(100, sign="+")


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
            _row(["bound / floor", "deployed", "learner", "gap / floor", "steps to 90 % of the best"]),
            _row(["---"] * 5),
        ]
        points: dict[float, float] = {}
        for arm in arms:
            some = [run for run in here if run["arm"] == arm]
            deployed, learner, gap = (Estimate.of([value(run) for run in some]) for value in (_deployed, _learner, _gap_over_floor))
            steps = [next((point[0] for point in run["curve"] if point[1] >= 0.9 * best[run["seed"]]), math.inf) for run in some]
            bound = ARMS[arm].tolerance
            reached = f"{statistics.median(steps):.0f}" if math.isfinite(statistics.median(steps)) else "not reached"
            lines.append(
                _row(["none" if bound is None else f"{bound:g}", deployed.text(100), learner.text(100), gap.text(digits=2), reached])
            )
            if bound is not None:
                points[bound] = 100 * deployed.mean
        unbounded = [100 * run["deployed_accuracy"] for run in here if run["arm"] == UNBOUNDED]
        name = f"tolerance-{task}-{target}.svg"
        chart = line_chart(
            {"bounded": (list(points), list(points.values()))}, title=f"{task} for {target}", x_label="tolerance / floor",
            y_label="deployed accuracy, %", horizontal={"no bound": statistics.mean(unbounded)} if unbounded else None, markers=True,
        )  # fmt: skip
        (folder / name).write_text(standalone(chart), "utf-8")
        lines += ["", f"![Deployed accuracy by tolerance: {task}, {target}](images/evidence/{name})"]
    return lines


def _deployed(run: Run) -> float:
    return float(run["deployed_accuracy"])


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
    for regime in (regime for regime in REGIMES if any(run["regime"] == regime for run in runs)):
        here = [run for run in runs if run["regime"] == regime]
        lines += ["", f"### {regime}", "", "Deployed accuracy, and the learner's own in brackets:", "", *accuracy_table(here)]
        lines += ["", "Against the best rival:", "", *difference_table(here)]
    images = docs / "images" / "evidence"
    swept = sweep(runs, images)
    lines += ["", "### By tolerance", *swept] if swept else []
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


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
