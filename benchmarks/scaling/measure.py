"""Whole runs of the command line on some engine processes and learner ranks, each of one thread."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scaling.calibrate import Sizes, settings
from hetero_rl.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PHASES = {"rollout": "perf/rollout_s", "learn": "perf/learner_s", "publish": "perf/publish_s", "wait": "perf/wait_s"}


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run is measured."""

    num_engines: int
    num_ranks: int = 1
    schedule: str = "sync"

    @property
    def name(self) -> str:
        """What its case is called."""
        counts = ((self.num_engines, "engine"), (self.num_ranks, "rank"))
        return ", ".join([*(f"{count} {what}{'s' * (count > 1)}" for count, what in counts), self.schedule])


def one_thread(target: str, folder: Path) -> Path:
    """A profile of `target` whose engine computes on one thread: OMP_NUM_THREADS is the learner's alone."""
    path = folder / "target.toml"
    path.write_text(f'name = "{target}-1"\ndescription = "one thread"\nextends = "{target}"\nengine.options.num_threads = 1\n')
    return path


def environment() -> dict[str, str]:
    """Of every process that is timed."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def run(point: Point, model_dir: Path, target: str, sizes: Sizes, num_steps: int) -> dict[str, float]:
    """Mean seconds of a step and its phases, and what it sampled; the first two steps and the last, which evaluates, are left out."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "pool.toml").write_text(f"[[engines]]\ncount = {point.num_engines}\n")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(point.num_ranks)] if point.num_ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "hetero_rl", "train", "--target", str(one_thread(target, folder))]
        command += ["--config", str(folder / "pool.toml"), "--run-dir", str(folder / "run")]
        command += [part for setting in settings(model_dir, sizes, num_steps, point.schedule) for part in ("--set", setting)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        rows = read_metrics(folder / "run")[3:-1]
    found = {name: statistics.mean(row[metric] for row in rows) for name, metric in PHASES.items()}
    found["step"] = statistics.mean(row["perf/step_s"] for row in rows)
    found["tokens"] = statistics.mean(row["rollout/tokens"] for row in rows)
    found["taught_share"] = 1 - statistics.mean(row["reward/flat_groups"] for row in rows)
    return found
