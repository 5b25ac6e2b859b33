"""What every benchmark shares: its arguments, taking turns, and the record it writes."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from deploy_targets.hardware import RUNTIME_PACKAGES, describe_machine, package_versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = (*RUNTIME_PACKAGES, "deepspeed", "accelerate", "trl")
T = TypeVar("T")


class Measurement(BaseModel):
    """Repeated runs of one side, and of the side it is held against; entry i of all lists was measured in round i.

    `median`, `low`, `high`: of `runs`, in `unit`; low and high are the smallest and the largest run. The `ratio_*` are those
    of `ratios`, whose meaning `ratio_of` spells out. Extra keys hold what only one benchmark knows.
    """

    model_config = ConfigDict(extra="allow")

    runs: list[float]
    median: float
    low: float
    high: float
    unit: str
    ratio_of: str | None = None
    baseline_runs: list[float] | None = None
    ratios: list[float] | None = None
    ratio_median: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None

    @model_validator(mode="after")
    def summaries_follow_from_the_runs(self) -> Measurement:
        """No figure typed by hand: every summary is recomputed from the raw runs."""
        if not self.runs:
            raise ValueError("runs is empty")
        if (self.median, self.low, self.high) != summary(self.runs):
            raise ValueError(f"median, low, high are not those of the runs: {summary(self.runs)}")
        if (self.ratios is None) != (self.ratio_of is None):
            raise ValueError("ratios and ratio_of go together")
        wanted = (None, None, None) if self.ratios is None else summary(self.ratios)
        if (self.ratio_median, self.ratio_low, self.ratio_high) != wanted:
            raise ValueError(f"ratio_median, ratio_low, ratio_high are not those of the ratios: {wanted}")
        if any(other is not None and len(other) != len(self.runs) for other in (self.ratios, self.baseline_runs)):
            raise ValueError("runs, baseline_runs and ratios must have one entry per round")
        return self


class Record(Measurement):
    """One JSON file: the headline measurement, all cases, and what is needed to measure again."""

    name: str
    command: str
    headline: str
    """The entry of `cases` whose numbers stand at the top level."""
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    quick: bool
    cases: dict[str, Measurement]


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    return statistics.median(values), min(values), max(values)


def measurement(
    runs: Sequence[float], unit: str, *, baseline: Sequence[float] = (), ratio_of: str | None = None, inverse: bool = False, **extra: Any
) -> Measurement:
    """Summarize `runs`; with a `baseline` also the ratios runs / baseline (baseline / runs when `inverse`), round by round."""
    median, low, high = summary(runs)
    found: dict[str, Any] = {"runs": list(runs), "median": median, "low": low, "high": high, "unit": unit, **extra}
    if baseline:
        ratios = [(b / r if inverse else r / b) for r, b in zip(runs, baseline, strict=True)]
        ratio_median, ratio_low, ratio_high = summary(ratios)
        found |= {"baseline_runs": list(baseline), "ratios": ratios, "ratio_of": ratio_of}
        found |= {"ratio_median": ratio_median, "ratio_low": ratio_low, "ratio_high": ratio_high}
    return Measurement.model_validate(found)


def arguments(name: str, description: str | None, rounds: int = 7, **choices: Sequence[str]) -> argparse.Namespace:
    """`--quick`, `--out`, `--rounds`, `--threads`, an option for each list of `choices`; a quick run has 2 rounds."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run at all; writes nothing without --out")
    parser.add_argument("--out", type=Path, help=f"default benchmarks/results/{name}.json")
    parser.add_argument("--rounds", type=int, help=f"measured rounds after the warm-up (default {rounds}, quick 2)")
    parser.add_argument("--threads", type=int, default=min(2, num_cores()), help="threads of each side (default %(default)s)")
    for option, values in choices.items():
        parser.add_argument(f"--{option}", nargs="+", choices=values, help=f"default {' '.join(values)}")
    parsed = parser.parse_args()
    parsed.rounds = parsed.rounds or (2 if parsed.quick else rounds)
    parsed.name = name
    parsed.load_average = os.getloadavg()[0]
    parsed.out = parsed.out or (None if parsed.quick else RESULTS / f"{name}.json")
    return parsed


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_turns(sides: Mapping[str, Callable[[], T]], rounds: int, warmups: int = 1) -> dict[str, list[T]]:
    """Call all `sides` once per round, one at a time, the order reversed every other round; warm-up rounds are dropped."""
    results: dict[str, list[T]] = {side: [] for side in sides}
    for turn in range(-warmups, rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            result = sides[side]()
            if turn >= 0:
                results[side].append(result)
        label = f"round {turn + 1} of {rounds}" if turn >= 0 else "warm-up"
        print(f"  {label}", file=sys.stderr, flush=True)
    return results


def write(options: argparse.Namespace, cases: dict[str, Measurement], headline: str, settings: dict[str, Any]) -> Record:
    """Validate the record, print one line per case, and write it to `--out`."""
    shared = {
        "num_threads": options.threads,
        "rounds": options.rounds,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average_1_min_at_start": options.load_average,
    }
    record = Record.model_validate(
        {
            **cases[headline].model_dump(),
            "name": options.name,
            "command": " ".join(["python", "-m", f"benchmarks.{options.name}", *sys.argv[1:]]),
            "headline": headline,
            "machine": asdict(describe_machine()),
            "versions": package_versions(PACKAGES),
            "settings": {**shared, **settings},
            "quick": options.quick,
            "cases": {name: case.model_dump() for name, case in cases.items()},
        }
    )
    for name, case in cases.items():
        ratio = f"; {case.ratio_of}: {case.ratio_median:.4g} ({case.ratio_low:.4g} to {case.ratio_high:.4g})" if case.ratios else ""
        print(f"{name}: {case.median:.4g} {case.unit} ({case.low:.4g} to {case.high:.4g}){ratio}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(record.model_dump_json(indent=2, exclude_none=True) + "\n", "utf-8")
        print(f"written: {options.out}", file=sys.stderr)
    return record
