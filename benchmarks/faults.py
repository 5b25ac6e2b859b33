"""What is done to runs, engines, agents and files, how often, and how often it was survived: the table of docs/reliability.md.

    python -m benchmarks.faults run [--out FILE] [-- PYTEST ARGUMENTS]     cause the faults, one JSON line a test
    python -m benchmarks.faults report                                     the table, from benchmarks/results/faults.jsonl alone

`HETERO_RL_TESTS_FAULTS` is how often each kind is caused, `HETERO_RL_TESTS_FUZZ` how many inputs each reader gets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import PACKAGES, RESULTS
from deploy_targets.hardware import describe_machine, package_versions

OUT = RESULTS / "faults.jsonl"
ROOT = RESULTS.parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: made by python -m benchmarks.faults report -->\n", "<!-- end of faults -->\n"
FEWEST, INPUTS = 50, 100_000
Line = dict[str, Any]
SHOWN = ("torch", "deepspeed", "onnxruntime", "vllm")


def run(out: Path, arguments: list[str]) -> int:
    """Run the marked tests, and those of tests/recovery; the lines come after one that says what was run, where and when."""
    chosen = {"HETERO_RL_TESTS_FAULTS": str(FEWEST), "HETERO_RL_TESTS_FUZZ": str(INPUTS)}
    counts = {name: os.environ.get(name, default) for name, default in chosen.items()}
    command = ["-m", "pytest", "-n", "0", "-m", "fault", *(arguments or ["tests"])]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    begin = time.monotonic()
    header = {
        "command": " ".join([*(f"{name}={value}" for name, value in counts.items()), "python", *command]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": asdict(describe_machine()),
        "versions": package_versions(PACKAGES),
    }
    append(out, header)
    environment = {**os.environ, **counts, "HETERO_RL_TESTS_FAULTS_LOG": str(out.resolve())}
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode
    append(out, {"exit_code": code, "hours": round((time.monotonic() - begin) / 3600, 3)})
    return code


def append(out: Path, line: Line) -> None:
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main(arguments: list[str]) -> int:
    """`run` or `report`."""
    if arguments[:1] == ["run"]:
        rest = arguments[1:]
        out = OUT
        if rest[:1] == ["--out"]:
            out, rest = Path(rest[1]), rest[2:]
        return run(out, [argument for argument in rest if argument != "--"])
    if arguments == ["report"]:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), read(OUT)), "utf-8")
        return 0
    print(__doc__, file=sys.stderr)
    return 2


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def with_table(page: str, lines: Iterable[Line]) -> str:
    """`page` with the table between its markers. Raises `SystemExit` where it has lost them."""
    before, found, rest = page.partition(BEGIN)
    _, also_found, after = rest.partition(END)
    if not (found and also_found):
        raise SystemExit(f"{PAGE} has lost the markers of its table; put them back")
    return "\n".join([before + BEGIN, *table(lines), "", END]) + after


def table(lines: Iterable[Line]) -> list[str]:
    """One row for each kind of fault, sums over its tests and runs, and below it where and when each run was made."""
    tried: dict[str, int] = {}
    survived: dict[str, int] = {}
    tests: dict[str, set[str]] = {}
    runs: list[str] = []
    for line in lines:
        if "fault" in line:
            fault = line["fault"]
            tried[fault] = tried.get(fault, 0) + line["tried"]
            survived[fault] = survived.get(fault, 0) + line["survived"]
            tests.setdefault(fault, set()).add(line["test"].partition("[")[0].replace("::", "`, `"))
        elif "command" in line:
            cpu, num_cores, versions = line["machine"]["cpu"], line["machine"]["num_cores"], line["versions"]
            shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
            runs.append(f"- {line['date']}, commit {line['commit'][:7]}: `{line['command']}`. {cpu}, {num_cores} cores; {shown}")
    rows = [
        f"| {fault} | {tried[fault]:,} | {survived[fault]:,} | {', '.join(f'`{test}`' for test in sorted(tests[fault]))} |"
        for fault in sorted(tried)
    ]
    return ["| fault | tried | survived | test |", "| --- | ---: | ---: | --- |", *rows, "", *runs]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
