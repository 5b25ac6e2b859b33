"""What the lines of the results amount to: means with intervals, pairs of runs, gaps at equal reward."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.cells import ARMS

Run = dict[str, Any]
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
"""Student's t at 97.5 %, for 1, 2, ... degrees of freedom."""
SMOOTHING = 10
"""Steps that a reward is averaged over where runs are compared at equal reward."""
LATE_STEPS = 20
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
    curves = [smoothed(run["reward"]) for run in runs]
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


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, `SMOOTHING` in all."""
    return [statistics.mean(values[max(0, i - SMOOTHING + 1) : i + 1]) for i in range(len(values))]


def places(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """The pairs of task and target, in the order of their first run."""
    return list(dict.fromkeys((run["task"], run["target"]) for run in runs))


def by_arm_and_seed(runs: Iterable[Run]) -> dict[str, dict[int, Run]]:
    """The runs of one cell: arm -> seed -> run."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(run["arm"], {})[run["seed"]] = run
    return found


def best_rival(by_arm: Mapping[str, Mapping[int, Run]]) -> tuple[str, Estimate] | None:
    """The best by mean of the rivals that ran under the most seeds, with its deployed accuracy; None where none ran.

    It is chosen on the runs that it is then held against: a difference whose interval only just leaves out 0 says little.
    """
    rivals = {arm: Estimate.of([deployed(run) for run in found.values()]) for arm, found in by_arm.items() if is_rival(arm)}
    return max(rivals.items(), key=lambda item: (item[1].count, item[1].mean)) if rivals else None


def is_rival(arm: str) -> bool:
    """Neither a recipe of ours nor without any mismatch."""
    return not ARMS[arm].ours and arm != "control"


def pairs(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> list[tuple[Run, Run]]:
    """The runs of two arms under the same seeds."""
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def difference(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> Estimate:
    """Deployed accuracy of one arm less that of another, paired by seed."""
    return Estimate.of([deployed(one) - deployed(other) for one, other in pairs(ours, theirs)])


def deployed(run: Run) -> float:
    """Its deployed accuracy."""
    return float(run["deployed_accuracy"])


def shown(difference: Estimate) -> str:
    """A difference in points with its sign; "" where there is none."""
    return "" if math.isnan(difference.mean) else difference.text(100, sign="+")


def table_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
