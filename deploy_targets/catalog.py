"""Names of engines and quantizers -> the classes behind them, imported only when asked for.

Third parties add theirs by the entry-point groups `deploy_targets.engines` and `deploy_targets.quantizers`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from deploy_targets.errors import MissingPackageError, UnknownNameError
from deploy_targets.families import has_experts
from deploy_targets.hardware import find_gpus
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Engine, Quantizer

ENGINES = {
    "fake": "deploy_targets.engines.fake:FakeEngine",
    "onnxruntime": "deploy_targets.engines.onnxruntime:OnnxRuntimeEngine",
    "transformers": "deploy_targets.engines.transformers:TransformersEngine",
    "vllm": "deploy_targets.engines.vllm:VllmEngine",
}
QUANTIZERS = {
    "compressed-tensors": "deploy_targets.quantizers.compressed_tensors:CompressedTensorsQuantizer",
    "none": "deploy_targets.quantizers.none:NoQuantizer",
    "onnx-matmulnbits": "deploy_targets.quantizers.onnx_matmulnbits:OnnxMatMulNBitsQuantizer",
}


def _known(kind: str, shipped: Mapping[str, str]) -> dict[str, str]:
    found = {point.name: point.value for point in entry_points(group=f"deploy_targets.{kind}s")}
    return {**found, **shipped}


def extra_of(profile: TargetProfile) -> str:
    """The pip extra that brings this target's packages on this machine."""
    hardware = profile.hardware
    return hardware.cpu_extra if hardware.cpu_extra and not find_gpus() else hardware.extra


def resolve(kind: str, name: str, extra: str) -> Any:
    """The class registered as `name`; `kind` is `engine` or `quantizer`.

    Raises `UnknownNameError` (lists the known) or `MissingPackageError` (names the pip `extra`).
    """
    known = _known(kind, ENGINES if kind == "engine" else QUANTIZERS)
    if name not in known:
        raise UnknownNameError(kind, name, known)
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("deploy_targets", "hetero_rl")):
            raise
        raise MissingPackageError(error.name, f"the {kind} {name!r}", extra or name) from error


def open_engine(profile: TargetProfile, artifact_dir: Path, weight_version: int) -> Engine:
    """Start the profile's engine on a folder in its native format, in this process or in one of its own."""
    if is_rebuilt(profile, artifact_dir):
        from deploy_targets.engines.rebuild import RebuildingEngine

        return RebuildingEngine(partial(_start_engine, profile), artifact_dir, weight_version)
    return _start_engine(profile, artifact_dir, weight_version)


def is_rebuilt(profile: TargetProfile, model_dir: Path) -> bool:
    """Whether the engine is started anew for every update, as the profile says or as the model needs; reads its `config.json`.

    vLLM 0.32 packs the experts of a model for its CPU kernel once and does not repack them: after a reload in place they are not
    those that were published (UnquantizedFusedMoEMethod._setup_kernel).
    """
    if profile.engine.publish == "rebuild":
        return True
    return profile.engine.name == "vllm" and not find_gpus() and has_experts(json.loads((model_dir / "config.json").read_text("utf-8")))


def _start_engine(profile: TargetProfile, artifact_dir: Path, weight_version: int) -> Engine:
    if profile.engine.process == "own":
        from deploy_targets.engines.process import ProcessEngine

        return ProcessEngine(profile, artifact_dir, weight_version)
    return open_engine_here(profile, artifact_dir, weight_version)


def open_engine_here(profile: TargetProfile, artifact_dir: Path, weight_version: int) -> Engine:
    """Start the profile's engine in this very process."""
    engine_class = resolve("engine", profile.engine.name, extra_of(profile))
    options = {"max_model_len": profile.max_model_len, **profile.engine.options}
    return cast(Engine, engine_class(Path(artifact_dir).resolve(), options, weight_version))


def make_quantizer(profile: TargetProfile, model_dir: Path) -> Quantizer:
    """The profile's quantizer for the model whose `config.json` lies in `model_dir`."""
    quantizer_class = resolve("quantizer", profile.scheme.quantizer, extra_of(profile))
    model_config = json.loads((model_dir / "config.json").read_text("utf-8"))
    return cast(Quantizer, quantizer_class(profile.scheme, model_config))
