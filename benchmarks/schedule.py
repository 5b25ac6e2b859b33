"""Seconds of a step with `loop.schedule = "one_step_off"` against `sync`: whole runs of the command line, in turns.

On one machine the engine and the learner compute on the same cores, so that there is only as much to gain as both leave idle. A side
with one thread for each of them shows what is gained when they do not compete: it is held against `sync` with all threads.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.common import Measurement, arguments, in_turns, measurement, write
from hetero_rl.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SIDES = {"sync": ("sync", 0), "one_step_off": ("one_step_off", 0), "one_step_off, one thread each": ("one_step_off", 1)}
"""Side -> schedule, and threads of the learner and of the engine each (0: `--threads`)."""


def step_seconds(target: str, schedule: str, threads: int, num_steps: int) -> float:
    """Median `perf/step_s` of a run's steps but the first two, without a checkpoint between them."""
    settings = (
        f"loop.num_steps={num_steps}", f"loop.schedule={schedule}", f"checkpoint.every_steps={num_steps}", "recipe=plain",
        f"evaluation.every_steps={num_steps}", "evaluation.num_problems=8", "evaluation.num_final_problems=8",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "target.toml"
        # OMP_NUM_THREADS is the learner's alone: an engine takes every core where its profile says nothing else.
        profile.write_text(
            f'name = "{target}-threads"\ndescription = "{target}, {threads} threads"\nextends = "{target}"\n'
            f"engine.options.num_threads = {threads}\n"
        )
        command = [sys.executable, "-m", "hetero_rl", "train", "--target", str(profile), "--run-dir", f"{folder}/run"]
        command += [part for setting in settings for part in ("--set", setting)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return statistics.median(row["perf/step_s"] for row in read_metrics(Path(folder) / "run")[3:])


def main() -> int:
    options = arguments("schedule", __doc__, rounds=5, targets=("int4-onnx", "q2_k-llamacpp"))
    targets, num_steps = options.targets or ("int4-onnx", "q2_k-llamacpp"), 5 if options.quick else 12
    cases: dict[str, Measurement] = {}
    for target in targets:
        print(target, file=sys.stderr)
        sides = {
            side: partial(step_seconds, target, schedule, threads or options.threads, num_steps)
            for side, (schedule, threads) in SIDES.items()
        }
        found = in_turns(sides, options.rounds, warmups=0)
        for side in list(SIDES)[1:]:
            cases[f"{target}, {side}"] = measurement(
                found[side], "s per step", baseline=found["sync"], ratio_of="step with sync / step of this side, times", inverse=True
            )
    write(options, cases, f"{targets[0]}, {list(SIDES)[-1]}", {"num_steps": num_steps})
    return 0


if __name__ == "__main__":
    sys.exit(main())
