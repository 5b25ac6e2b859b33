"""`python -m benchmarks.evidence run --suite screening`, `python -m benchmarks.evidence report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS, num_cores
from benchmarks.evidence.cells import ARMS, FULL_PRECISION, REGIMES, SUITES, TASKS, Block, cells
from benchmarks.evidence.report import write_report
from benchmarks.evidence.runner import run_cells

OUT = RESULTS / "evidence.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"


def main(given: Sequence[str] | None = None) -> int:
    """Returns 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="make the tables and curves of docs/evidence.md anew").add_argument("--out", type=Path, default=OUT)
    run = commands.add_parser("run", help="run what has no line in --out yet")
    run.add_argument("--suite", choices=SUITES, help="without one, every combination of the five options below")
    run.add_argument("--tasks", nargs="+", choices=TASKS, help="of the suite these alone; so for the next four")
    run.add_argument("--targets", nargs="+")
    run.add_argument("--regimes", nargs="+", choices=REGIMES)
    run.add_argument("--arms", nargs="+", choices=ARMS)
    run.add_argument("--seeds", nargs="+", type=int)
    run.add_argument("--reference", default=FULL_PRECISION, help="target that rounds nothing (default %(default)s)")
    run.add_argument("--jobs", type=int, default=num_cores(), help="runs at a time (default %(default)s)")
    run.add_argument("--out", type=Path, default=OUT)
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting on top of those of the cells")
    run.add_argument("--work", type=Path, default=Path("runs/evidence"), help="models, problems and runs under way")
    options = parser.parse_args(given)
    if options.command == "report":
        write_report(options.out, PAGE)
        return 0
    chosen = {key: getattr(options, key) for key in ("tasks", "targets", "regimes", "arms", "seeds")}
    missing = [f"--{key}" for key, values in chosen.items() if not values]
    if options.suite is None and missing:
        parser.error(f"without --suite there is nothing to take the rest from: give {', '.join(missing)}")
    blocks = [Block(**chosen)] if options.suite is None else SUITES[options.suite]
    wanted = list(cells(blocks, options.reference, **{key.removesuffix("s"): values for key, values in chosen.items() if values}))
    if not wanted:
        parser.error(f"suite {options.suite!r} has no such cell; without --suite any combination can be run")
    return int(run_cells(wanted, options.out, options.work.resolve(), options.jobs, options.set) > 0)


if __name__ == "__main__":
    sys.exit(main())
