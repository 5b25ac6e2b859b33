"""What a publish costs: quantize, swap, proof; against one plain copy of the bf16 weights, and as a share of a training step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import models
from benchmarks.common import Measurement, arguments, measurement, summary, write
from benchmarks.own_step import OwnStep, StepSpec
from benchmarks.worker import Worker, serve
from deploy_targets.catalog import make_quantizer
from deploy_targets.profile import load_profile

TARGETS = ("int4-onnx", "int4-vllm")
PHASES = ("quantize_s", "swap_s", "proof_s")
COPY_REPEATS = 3


def body(connection: Connection, spec: StepSpec) -> None:
    """One training step per request, so that each publish has really new weights; then rounding alone, and copies, of the same weights."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        step = OwnStep(spec, Path(folder) / "serving", stack)
        quantizer = make_quantizer(load_profile(spec.target), spec.model_dir)

        def run() -> dict[str, float]:
            seconds = step()
            start = time.perf_counter()
            for _ in quantizer.quantize(step.parts.learner.named_tensors()):
                pass
            round_s = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(COPY_REPEATS):
                copies = [tensor.clone() for _, tensor in step.parts.learner.named_tensors()]
                del copies
            copy_s = (time.perf_counter() - start) / COPY_REPEATS
            num_probe_tokens = sum(len(probe.tokens) - probe.prompt_len for probe in step.parts.publisher.probes)
            return {**seconds, "round_s": round_s, "copy_s": copy_s, "probe_tokens": num_probe_tokens}

        serve(connection, run)


def case(runs: Sequence[dict[str, float]], *, whole_step: bool) -> Measurement:
    """Milliseconds of a publish against those of a copy; `whole_step`: the runs' steps have the sizes of a real one."""

    def spread(values: list[float]) -> dict[str, float]:
        return dict(zip(("median", "low", "high"), summary(values), strict=True))

    extra = {"share_of_step": spread([run["publish_s"] / run["step_s"] for run in runs])} if whole_step else {}
    return measurement(
        [run["publish_s"] * 1e3 for run in runs],
        "ms per publish",
        baseline=[run["copy_s"] * 1e3 for run in runs],
        ratio_of="publish / one plain copy of the bf16 weights, times",
        phases_ms={phase.removesuffix("_s"): spread([run[phase] * 1e3 for run in runs]) for phase in PHASES},
        round_over_copy=spread([run["round_s"] / run["copy_s"] for run in runs]),
        num_rebuilds=int(runs[-1]["num_rebuilds"]),
        probe_tokens=int(runs[-1]["probe_tokens"]),
        **extra,
    )


def main() -> None:
    options = arguments("publish", __doc__)
    tiny_size, medium_size = ((4, 4, 16) if options.quick else (32, 8, 64)), (8, 4, 32)
    cases, settings = {}, {"tiny_step": tiny_size, "medium_step": medium_size}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"tiny": models.tiny(Path(temporary) / "tiny", quick=options.quick)}
        if not options.quick:
            folders["100M"] = models.medium(Path(temporary) / "100M")
        for size, model_dir in folders.items():
            settings[size] = models.describe(model_dir)
            # The larger model only has to move between two publishes: a small step does.
            sizes = tiny_size if size == "tiny" else medium_size
            for target in TARGETS:
                spec = StepSpec(model_dir, target, "off", *sizes, options.threads)
                with Worker(body, spec) as worker:
                    runs = [worker() for _ in range(options.rounds + 1)][1:]
                cases[f"{target}/{size}"] = case(runs, whole_step=size == "tiny")
    write(options, cases, "int4-onnx/tiny", settings)


if __name__ == "__main__":
    main()
