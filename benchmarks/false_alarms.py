"""How often a clean artifact does not pass: exports of the same weights under many seeds, each verified by a fresh engine.

A line of JSON for each verification, appended as they come; those that the file has already are not made again. Every seed has its own
probes and its own number of held-out problems. `--report` says what the lines say: counts of verdicts, and the exact 95 % interval of the
rate of false alarms (Clopper and Pearson) for each target.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from deploy_targets.artifact import PROBES_FILE, check_artifact
from deploy_targets.catalog import open_engine
from deploy_targets.hardware import describe_machine, package_versions
from deploy_targets.probes import read_probes
from deploy_targets.verify import verify

OUT = RESULTS / "false_alarms.jsonl"
TARGETS = ("int4-onnx", "q4_k_m-llamacpp")
FEWEST_PROBLEMS = 200


def verifications(target: str, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One line for each of `seeds`."""
    from rich.console import Console

    from hetero_rl.config import load_config
    from hetero_rl.export import export_artifact
    from hetero_rl.floor import measure_start
    from hetero_rl.parts import assemble
    from hetero_rl.tasks.rewards import artifact_reward
    from hetero_rl.view import View

    config, profile = load_config([], [], target)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parts = assemble(config, profile, folder / "serving", View(Console(quiet=True)), stack)
        state = measure_start(config, parts)
        for seed in seeds:
            loop = config.loop.model_copy(update={"seed": seed})
            evaluation = config.evaluation.model_copy(update={"num_final_problems": FEWEST_PROBLEMS + seed})
            export_artifact(config.model_copy(update={"loop": loop, "evaluation": evaluation}), profile, parts, state, folder / "artifact")
            manifest = check_artifact(folder / "artifact")
            assert manifest.task is not None
            start = time.perf_counter()
            engine = open_engine(manifest.profile, folder / "artifact", manifest.weight_version)
            try:
                probes = read_probes(folder / "artifact" / PROBES_FILE)
                report = verify(folder / "artifact", engine, manifest, probes, reward=artifact_reward(manifest.task.reward, None))
            finally:
                engine.close()
            gates = [asdict(gate) for gate in report.gates]
            yield {
                "target": target, "seed": seed, "verdict": report.verdict, "gates": gates, "seconds": time.perf_counter() - start,
                "machine": asdict(describe_machine()), "versions": package_versions(),
            }  # fmt: skip


def summarize(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row of a Markdown table for each target; an alarm is a verdict that is not `pass`."""
    rows = ["| target | verifications | verdicts | false alarms | 95 % interval |", "| --- | --- | --- | --- | --- |"]
    for target in dict.fromkeys(line["target"] for line in lines):
        verdicts = Counter(line["verdict"] for line in lines if line["target"] == target)
        count = sum(verdicts.values())
        low, high = exact_interval(alarms := count - verdicts["pass"], count)
        said = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.most_common())
        rows.append(f"| `{target}` | {count} | {said} | {alarms} | {low:.1%} to {high:.1%} |")
    return rows


def exact_interval(hits: int, count: int) -> tuple[float, float]:
    """Of a share, two-sided 95 %; Clopper and Pearson, Biometrika 26 (1934): where either tail has 2.5 %."""

    def tail(rate: float, sizes: range) -> float:
        return sum(math.comb(count, size) * rate**size * (1 - rate) ** (count - size) for size in sizes)

    low = solved_for(lambda rate: tail(rate, range(hits, count + 1))) if hits else 0.0
    return low, 1 - solved_for(lambda rate: tail(1 - rate, range(hits + 1))) if hits < count else 1.0


def solved_for(rising: Callable[[float], float]) -> float:
    """Where in [0, 1] the tail that rises with the rate reaches 2.5 %."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0.025 else (low, middle)
    return low


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was measured; nothing where there is no file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.false_alarms", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="default %(default)s")
    parser.add_argument("--count", type=int, default=100, help="seeds 0, 1, ... of each target (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    for target in () if options.report else options.targets:
        done = {line["seed"] for line in read_lines(options.out) if line["target"] == target}
        for line in verifications(target, [seed for seed in range(options.count) if seed not in done]):
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"  {target}, seed {line['seed']}: {line['verdict']}, {line['seconds']:.1f} s", file=sys.stderr, flush=True)
    print("\n".join(summarize(read_lines(options.out))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
