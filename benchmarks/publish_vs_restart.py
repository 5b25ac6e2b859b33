"""A publish against what is done without it: save a checkpoint, quantize it by the ecosystem's tool, start the engine anew.

int4-vllm: save_pretrained, compressed-tensors' own quantization of a loaded model, a new vLLM. int4-onnx: save_pretrained, the builder
of onnxruntime-genai, a new session. The tools run as programs of their own, as they are run by hand or from a script.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.common import Measurement, arguments, in_turns, measurement, summary, write
from benchmarks.own_step import OwnStep, StepSpec
from benchmarks.publish_targets import move_weights
from benchmarks.worker import Worker, serve

TARGETS = ("int4-onnx", "int4-vllm")
QUANTIZE = """
import sys
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM

source, out, group_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
arguments = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=group_size)
scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
with torch.no_grad():
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            groups = module.weight.view(module.weight.shape[0], -1, group_size)
            scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
            module.weight_scale.copy_(scale)
            if getattr(module, "weight_zero_point", None) is not None:
                module.weight_zero_point.copy_(zero_point)
compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
compressor.compress_model(model)
model.save_pretrained(out)
compressor.update_config(out)
"""


def body(connection: Connection, spec: StepSpec) -> None:
    """Answers `publish` and `restart` with seconds by phase, each on weights that have just moved."""
    import torch

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        step = OwnStep(spec, folder / "serving", stack)
        learner, publisher = step.parts.learner, step.parts.publisher
        generator = torch.Generator().manual_seed(0)
        version = step.state.weight_version

        def run(side: str) -> dict[str, float]:
            nonlocal version
            move_weights(learner, generator)
            if side == "restart":
                return restart(spec, learner, folder)
            version += 1
            start = time.perf_counter()
            publisher.publish(version)
            return {"seconds": time.perf_counter() - start}

        serve(connection, run)


def restart(spec: StepSpec, learner: Any, folder: Path) -> dict[str, float]:
    """Seconds of saving, quantizing and starting."""
    from shutil import copy, rmtree

    from deploy_targets.catalog import open_engine

    profile = models.profile_for(spec.target, spec.num_threads)
    saved, quantized = folder / "saved", folder / "quantized"
    for path in (saved, quantized):
        rmtree(path, ignore_errors=True)
    start = time.perf_counter()
    learner.policy.lm.save_pretrained(saved)
    for file in spec.model_dir.glob("token*"):
        copy(file, saved)
    saved_s = time.perf_counter()
    if profile.engine.name == "onnxruntime":
        options = [f"block_size={profile.scheme.group_size}", "accuracy_level=1"]
        tool = ["-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu", "-m", str(saved), "-o", str(quantized)]
        command = [sys.executable, *tool, "-c", str(folder / "cache"), "--extra_options", *options]
    else:
        command = [sys.executable, "-c", QUANTIZE, str(saved), str(quantized), str(profile.scheme.group_size)]
    subprocess.run(command, check=True, capture_output=True)
    quantized_s = time.perf_counter()
    if profile.engine.name == "onnxruntime":
        import onnxruntime as ort

        ort.InferenceSession(str(quantized / "model.onnx"), providers=["CPUExecutionProvider"])
    else:
        open_engine(profile, quantized, 1).close()
    started_s = time.perf_counter()
    return {
        "seconds": started_s - start,
        "save_s": saved_s - start,
        "quantize_s": quantized_s - saved_s,
        "start_s": started_s - quantized_s,
    }


def case(found: dict[str, list[dict[str, float]]]) -> Measurement:
    """Seconds of a publish, proof included, against those of the restart, proof not included as nobody runs one."""
    phases = {
        phase: dict(zip(("median", "low", "high"), summary([run[phase] for run in found["restart"]]), strict=True))
        for phase in ("save_s", "quantize_s", "start_s")
    }
    return measurement(
        [run["seconds"] for run in found["publish"]],
        "s per publish",
        baseline=[run["seconds"] for run in found["restart"]],
        inverse=True,
        ratio_of="save, quantize by the ecosystem's tool, start anew / publish with its proof",
        restart_phases_s=phases,
    )


def main() -> None:
    options = arguments("publish_vs_restart", __doc__, rounds=5, targets=TARGETS)
    cases = {}
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = models.tiny(Path(temporary) / "model", quick=True) if options.quick else models.medium(Path(temporary) / "model")
        for target in options.targets or TARGETS:
            with Worker(body, StepSpec(model_dir, target, "off", 8, 4, 16, options.threads)) as worker:
                sides = {side: lambda side=side: worker(side) for side in ("publish", "restart")}
                cases[target] = case(in_turns(sides, options.rounds))
        settings = models.describe(model_dir)
    write(options, cases, next(iter(cases)), {"model": settings})


if __name__ == "__main__":
    main()
