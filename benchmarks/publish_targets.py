"""A publish for every target that runs here: quantize, swap, proof; against one plain copy of the bf16 weights; peak memory.

The weights are moved by noise between two publishes, as an optimizer step moves them, so that each has really new ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks import models
from benchmarks.common import Measurement, arguments, measurement, summary, write
from benchmarks.own_step import OwnStep, StepSpec
from benchmarks.publish import COPY_REPEATS, PHASES
from benchmarks.worker import Worker, serve
from deploy_targets.preflight import check_target
from deploy_targets.profile import shipped_profiles

NOISE = 2e-3
"""Standard deviation of a step's noise over that of the weight."""
BF16_BYTES = 2


def body(connection: Connection, spec: StepSpec) -> None:
    """One publish per request."""
    import torch

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        step = OwnStep(spec, Path(folder) / "serving", stack)
        learner, publisher = step.parts.learner, step.parts.publisher
        generator = torch.Generator().manual_seed(0)
        version = step.state.weight_version

        def run() -> dict[str, float]:
            nonlocal version
            move_weights(learner, generator)
            start = time.perf_counter()
            for _ in range(COPY_REPEATS):
                copies = [tensor.clone() for _, tensor in learner.named_tensors()]
                del copies
            copy_s = (time.perf_counter() - start) / COPY_REPEATS
            before_mib = reset_peak_mib()
            version += 1
            start = time.perf_counter()
            stats = publisher.publish(version)
            publish_s = time.perf_counter() - start
            found = {phase: getattr(stats, phase) for phase in PHASES}
            largest = max(tensor.numel() for _, tensor in learner.named_tensors()) * BF16_BYTES / 2**20
            peak = {"peak_mib": peak_mib() - before_mib, "largest_tensor_mib": largest}
            return {**found, **peak, "publish_s": publish_s, "copy_s": copy_s, "num_rebuilds": publisher.num_rebuilds}

        serve(connection, run)


def move_weights(learner: Any, generator: Any) -> None:
    """Add noise to every weight in place, about what a step of the optimizer does."""
    import torch

    with torch.no_grad():
        for parameter in learner.policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (NOISE * parameter.float().std())
            parameter.add_(noise.to(parameter))
    for layer in learner.twins:
        layer.forget()


def reset_peak_mib() -> float:
    """Resident memory of this process and of the engine's, in MiB, from which `peak_mib` counts anew (Linux)."""
    for pid in process_ids():
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return sum(_status_mib(pid, "VmRSS") for pid in process_ids())


def peak_mib() -> float:
    """The most resident memory of each process since `reset_peak_mib`, in MiB; their sum bounds what they held together."""
    return sum(_status_mib(pid, "VmHWM") for pid in process_ids())


def process_ids() -> list[int]:
    """This process, and those it started: an engine of its own."""
    return [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]


def _status_mib(pid: int, key: str) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def case(runs: Sequence[dict[str, float]]) -> Measurement:
    """Milliseconds of a publish against those of a copy, by phase; memory above what the process held before."""

    def spread(values: list[float]) -> dict[str, float]:
        return dict(zip(("median", "low", "high"), summary(values), strict=True))

    return measurement(
        [run["publish_s"] * 1e3 for run in runs],
        "ms per publish",
        baseline=[run["copy_s"] * 1e3 for run in runs],
        ratio_of="publish / one plain copy of the bf16 weights, times",
        phases_ms={phase.removesuffix("_s"): spread([run[phase] * 1e3 for run in runs]) for phase in PHASES},
        quantize_over_copy=spread([run["quantize_s"] / run["copy_s"] for run in runs]),
        peak_mib_above_before=spread([run["peak_mib"] for run in runs]),
        largest_tensor_mib=runs[0]["largest_tensor_mib"],
        num_rebuilds=int(runs[-1]["num_rebuilds"]),
    )


def runnable() -> list[str]:
    """Targets that run on this machine and serve a model."""
    return [name for name, profile in shipped_profiles().items() if name != "fake" and not check_target(profile)]


def main() -> None:
    options = arguments("publish_targets", __doc__, rounds=3, targets=runnable(), sizes=list(models.SIZES))
    cases: dict[str, Measurement] = {}
    settings: dict[str, object] = {"noise": NOISE}
    with tempfile.TemporaryDirectory() as temporary:
        for size in options.sizes or (["tiny"] if options.quick else ["tiny", "100M"]):
            model_dir = models.SIZES[size](Path(temporary) / size)
            settings[size] = models.describe(model_dir)
            for target in options.targets or runnable():
                with Worker(body, StepSpec(model_dir, target, "off", 8, 4, 16, options.threads)) as worker:
                    runs = [worker() for _ in range(options.rounds + 1)][1:]
                cases[f"{target}/{size}"] = case(runs)
                print(f"  {target}/{size}: {cases[f'{target}/{size}'].median:.0f} ms", file=sys.stderr, flush=True)
    write(options, cases, next(iter(cases)), settings)


if __name__ == "__main__":
    main()
