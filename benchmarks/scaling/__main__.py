"""`python -m benchmarks.scaling` measures and checks the simulation; with `plan` it makes tables and charts of larger machines."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.common import RESULTS, Measurement, arguments, measurement, num_cores, write
from benchmarks.scaling import calibrate, transfer
from benchmarks.scaling.measure import Point, environment, one_thread, run
from benchmarks.scaling.model import Cluster, Step, Workload, simulate
from benchmarks.scaling.plan import HARDWARE, Measured, plan, read_hardware
from benchmarks.scaling.report import PLAN_FILE, read_plan, table, write_report
from benchmarks.worker import Worker
from deploy_targets.hardware import describe_machine

TARGET = "int4-onnx"
POINTS = (Point(1), Point(2), Point(4), Point(1, 2), Point(1, 1, "one_step_off"))
DOCS = Path(__file__).parents[2] / "docs"
PLAN = RESULTS / PLAN_FILE


def predicted(found: dict[str, Any], point: Point, sizes: calibrate.Sizes, seen: dict[str, float]) -> Step:
    """The simulation of a run here: calibrated costs, and how many tokens and gradients the run itself had."""
    lengths = np.array(found["lengths"])
    scale = seen["tokens"] / (sizes.num_prompts * sizes.group_size) / lengths.mean()
    lengths = np.clip(np.round(lengths * scale), 1, sizes.max_tokens).astype(int)
    workload = Workload(sizes.num_prompts, sizes.group_size, found["prompt_tokens"], tuple(lengths.tolist()), seen["taught_share"])
    cluster = Cluster(point.num_engines, point.num_ranks, point.schedule, local_cores=num_cores(), crowd=found["crowd"])
    return simulate(found["costs"], cluster, workload, num_steps=16)


def case(measured: Sequence[dict[str, float]], simulated: Sequence[Step]) -> Measurement:
    """Seconds of a step against what the simulation says, round by round, and its phases."""
    phases = {}
    for phase in ("rollout", "learn", "publish"):
        pairs = [(float(getattr(step, phase)), found[phase]) for step, found in zip(simulated, measured, strict=True)]
        measured_s, simulated_s = (statistics.median(pair[side] for pair in pairs) for side in (1, 0))
        phases[phase] = {"measured": measured_s, "simulated": simulated_s, "ratio": statistics.median(a / b for a, b in pairs)}
    return measurement(
        [found["step"] for found in measured],
        "s per step",
        baseline=[step.step for step in simulated],
        ratio_of="simulated / measured",
        inverse=True,
        phases_s=phases,
        tokens=[found["tokens"] for found in measured],
        taught_share=[found["taught_share"] for found in measured],
    )


def measure() -> int:
    """Rounds of a calibration and a run of each point, in turns; the record is written after each round."""
    options = arguments("scaling", __doc__, rounds=5)
    sizes = calibrate.Sizes(4, 4, 16, 1) if options.quick else calibrate.Sizes(16, 8, 64, 5)
    points, num_steps = ((Point(2),), 5) if options.quick else (POINTS, 10)
    seen: dict[Point, list[dict[str, float]]] = {point: [] for point in points}
    said: dict[Point, list[Step]] = {point: [] for point in points}
    settings: dict[str, Any] = {
        "target": TARGET,
        "step": asdict(sizes),
        "num_steps": num_steps,
        "num_cores": num_cores(),
        "calibrations": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model_dir = models.tiny(folder / "model", quick=options.quick)
        settings["model"] = models.describe(model_dir)
        with Worker(calibrate.body, model_dir, one_thread(TARGET, folder), sizes, environ=environment()) as worker:
            for turn in range(options.rounds):
                found = worker()
                about = {"load_average_1_min": os.getloadavg()[0], "costs": asdict(found["costs"]), "lengths": list(found["lengths"])}
                settings["calibrations"].append({**found, **about})
                for point in points if turn % 2 == 0 else reversed(points):
                    seen[point].append(run(point, model_dir, TARGET, sizes, num_steps))
                    said[point].append(predicted(found, point, sizes, seen[point][-1]))
                print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
                write(options, {point.name: case(seen[point], said[point]) for point in points}, Point(2).name, settings)
    return 0


def measure_plan() -> None:
    """What a plan takes from measurements, and the plan under the assumptions that are shipped."""
    sizes = calibrate.Sizes(32, 8, 64, 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model_dir = models.tiny(folder / "model")
        with Worker(calibrate.body, model_dir, one_thread(TARGET, folder), sizes, environ=environment()) as worker:
            lengths = np.array(worker("response_lengths"))
    measured = Measured(relative_lengths=tuple((lengths / lengths.mean()).round(4).tolist()), **transfer.rates(), **transfer.known())
    hardware = read_hardware()
    about = {"measured": measured.model_dump(), "hardware": hardware.model_dump(), "machine": asdict(describe_machine())}
    lines = [json.dumps(line) for line in (about, *plan(hardware, measured))]
    PLAN.write_text("\n".join(lines) + "\n", "utf-8")


def main(given: Sequence[str]) -> int:
    if given[:1] != ["plan"]:
        return measure()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling plan", description="Make docs/scaling.md anew, or print a plan of your own."
    )
    parser.add_argument("--hardware", type=Path, help=f"a copy of {HARDWARE.name} with your figures: prints the plan, writes nothing")
    parser.add_argument("--measure", action="store_true", help="measure anew what the plan takes from this machine")
    options = parser.parse_args(given[1:])
    if options.measure:
        measure_plan()
    if options.hardware is None:
        write_report(RESULTS, DOCS)
    else:
        hardware, (about, _) = read_hardware(options.hardware), read_plan(PLAN)
        print(table(plan(hardware, Measured.model_validate(about["measured"])), hardware.model_dump()["engines"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
