"""Runs cells by the command line of hetero-rl, some at a time, each on cores of its own; one JSON line per finished run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from benchmarks.common import num_cores
from benchmarks.evidence.cells import ARMS, TASKS, Cell
from benchmarks.evidence.tasks import write_files
from benchmarks.evidence.warm_start import SIZES, warm_start
from deploy_targets.hardware import describe_machine, package_versions
from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import read_metrics
from hetero_rl.run_folder import ENVIRONMENT_FILE

ROOT = Path(__file__).parents[2]
_SHARED: dict[Path, Lock] = {}
"""Runs that several cells share; the first to come makes them."""
WARM_STARTS = Path(__file__).parent / "warm_starts"
COLLAPSE = 0.5
"""A run has collapsed when it ends below this share of its best deployed accuracy."""


def finished(path: Path) -> dict[str, tuple[list[str], str]]:
    """Cell -> settings and warm start of its last line in `path`."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return {line["cell"]: (line["settings"], line.get("warm_start", "")) for line in map(json.loads, lines)}


def run_cells(wanted: Iterable[Cell], out: Path, work: Path, num_jobs: int, extra: Sequence[str] = ()) -> int:
    """Run what has no line in `out` yet, with `extra` settings on top; returns the number of runs that failed."""
    done, wanted = finished(out), list(wanted)
    for task in dict.fromkeys(cell.task for cell in wanted):
        prepare(task, work)
    waiting = [cell for cell in wanted if done.get(cell.key) != ([*cell.settings, *extra], warm_start_sha256(cell.task, work))]
    # Last, because it is an evaluation of what `control` trained: at its side it would only wait, and keep a core from others.
    waiting.sort(key=lambda cell: cell.arm == "ptq")
    print(f"{len(waiting)} runs to do, {len(done)} done", file=sys.stderr)
    cores: SimpleQueue[list[int]] = SimpleQueue()
    usable = sorted(os.sched_getaffinity(0))
    for job in range(num_jobs):
        cores.put(usable[job * len(usable) // num_jobs : (job + 1) * len(usable) // num_jobs])
    lock = Lock()

    def run(cell: Cell) -> bool:
        mine = cores.get()
        try:
            line = run_cell(cell, work, mine, extra)
        except RuntimeError as error:
            print(f"  {cell.key} failed:\n{error}", file=sys.stderr, flush=True)
            return False
        finally:
            cores.put(mine)
        with lock, open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"  {cell.key}: deployed {line['deployed_accuracy']:.3f}, {line['seconds']:.0f} s", file=sys.stderr, flush=True)
        return True

    with ThreadPoolExecutor(num_jobs) as pool:
        return sum(not good for good in pool.map(run, waiting))


def prepare(task: str, work: Path) -> None:
    """Problems and warm start of a task, made once; the warm starts of the published lines are kept, for another CPU makes others."""
    size = TASKS[task].size
    work.mkdir(parents=True, exist_ok=True)
    if size is None or (work / task / "model" / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory(dir=work) as folder:
        made = Path(folder) / task
        made.mkdir()
        write_files(task, made)
        if (kept := WARM_STARTS / task).is_dir():
            shutil.copytree(kept, made / "model")
        else:
            warm_start(task, SIZES[size], made / "model")
        shutil.rmtree(work / task, ignore_errors=True)
        shutil.move(made, work / task)


def warm_start_sha256(task: str, work: Path) -> str:
    """Of the weights that runs of `task` begin with; "" for the shipped model."""
    return "" if TASKS[task].size is None else sha256_of(work / task / "model" / "model.safetensors")


def run_cell(cell: Cell, work: Path, cores: list[int], extra: Sequence[str] = ()) -> dict[str, Any]:
    """Train, evaluate, and take the figures from what the run wrote. Raises `RuntimeError` with the last lines of a failed run."""
    start = time.time()
    with tempfile.TemporaryDirectory(dir=work) as folder, trained(cell, work, Path(folder), cores, extra) as run:
        rows = read_metrics(run)
        commit = json.loads((run / ENVIRONMENT_FILE).read_text("utf-8"))["git_commit"]
        deployed = {"deployed_accuracy": rows[-1]["eval/deployed_accuracy"], "learner_accuracy": rows[-1]["eval/learner_accuracy"]}
        deployed["gap"] = sum(row["constraint/engine_gap"] for row in rows[-10:]) / 10
        judged_by_target = cell.rollout_target == cell.served_by or ARMS[cell.arm].deployed_as_trained
        if not judged_by_target:
            call(["eval", str(run), "--target", cell.served_by, "--json", str(Path(folder) / "eval.json")], cores)
            numbers = json.loads((Path(folder) / "eval.json").read_text("utf-8"))
            deployed = {"deployed_accuracy": numbers["eval/deployed_accuracy"], "learner_accuracy": numbers["eval/learner_accuracy"]}
            deployed["gap"] = numbers["constraint/engine_gap"]
    curve = [row for row in rows if "eval/deployed_accuracy" in row]
    best = max(row["eval/deployed_accuracy"] for row in curve)
    return {
        "cell": cell.key,
        **{field: getattr(cell, field) for field in ("task", "target", "regime", "arm", "seed")},
        **deployed,
        "start_accuracy": rows[0]["eval/deployed_accuracy"],
        "floor": rows[0]["constraint/floor"],
        "tolerance": rows[0]["constraint/tolerance"],
        # The curve of `ptq` is that of the engine that made its rollouts.
        "collapsed": judged_by_target and rows[-1]["eval/deployed_accuracy"] < COLLAPSE * best,
        "infeasible": bool(rows[-1]["constraint/infeasible"]),
        "rebuilds": int(rows[-1]["publish/rebuilds"]),
        "curve": [[row["step"], row["eval/deployed_accuracy"], row["eval/learner_accuracy"]] for row in curve],
        "reward": [round(row["reward/mean"], 4) for row in rows[1:]],
        "engine_gap": [round(row["constraint/engine_gap"], 6) for row in rows[1:]],
        "lambda": [round(row["constraint/lambda"], 4) for row in rows[1:]],
        "entropy": [round(row["learner/entropy"], 4) for row in rows[1:]],
        "learner_s": sum(row["perf/learner_s"] for row in rows[1:]),
        "seconds": time.time() - start,
        "settings": [*cell.settings, *extra],
        "warm_start": warm_start_sha256(cell.task, work),
        "reference": cell.reference,
        "git_commit": commit,
        "machine": asdict(describe_machine()),
        "versions": package_versions(),
    }


@contextmanager
def trained(cell: Cell, work: Path, folder: Path, cores: list[int], extra: Sequence[str]) -> Iterator[Path]:
    """The finished run of `cell`: in `folder`, or kept in `work` where it is the same run for every target."""
    settings = (*task_settings(cell.task, work), *cell.settings, *extra)
    arguments = ["train", "--target", cell.rollout_target, *(part for setting in settings for part in ("--set", setting))]
    if not ARMS[cell.arm].full_precision_rollouts:
        call([*arguments, "--run-dir", str(folder / "run")], cores)
        yield folder / "run"
        return
    made_of = json.dumps(arguments) + warm_start_sha256(cell.task, work)
    kept = work / "full-precision" / sha256(made_of.encode()).hexdigest()[:16]
    with _SHARED.setdefault(kept, Lock()):
        if not kept.is_dir():
            call([*arguments, "--run-dir", str(folder / "run")], cores)
            kept.parent.mkdir(exist_ok=True)
            shutil.move(folder / "run", kept)
    yield kept


def task_settings(task: str, work: Path) -> tuple[str, ...]:
    """Where a task's problems and model lie."""
    if TASKS[task].size is None:
        return ()
    folder = work / task
    return (
        "task.type=dataset",
        f"task.path={folder / f'{task}-train.jsonl'}",
        f"task.heldout_path={folder / f'{task}-heldout.jsonl'}",
        f"model.path={folder / 'model'}",
    )


def call(arguments: list[str], cores: list[int]) -> None:
    """`hetero-rl ARGUMENTS` on `cores`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pinned = ["taskset", "-c", ",".join(map(str, cores))] if shutil.which("taskset") and len(cores) < num_cores() else []
    result = subprocess.run([*pinned, sys.executable, "-m", "hetero_rl", *arguments], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stdout + result.stderr)[-2000:])
