"""Names of engines and quantizers -> the classes behind them, imported only when asked for.

Third parties add theirs by the entry-point groups `deploy_targets.engines` and `deploy_targets.quantizers`.
"""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from deploy_targets.errors import MissingPackageError, PlugInError, ProfileError, UnknownNameError, UsageError
from deploy_targets.families import has_experts
from deploy_targets.hardware import find_gpus
from deploy_targets.plugins import PlugIn, find_plugins
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import CalibratedQuantizer, Engine, Quantizer

ENGINES = {
    "fake": "deploy_targets.engines.fake:FakeEngine",
    "llamacpp": "deploy_targets.engines.llamacpp:LlamaCppEngine",
    "onnxruntime": "deploy_targets.engines.onnxruntime:OnnxRuntimeEngine",
    "transformers": "deploy_targets.engines.transformers:TransformersEngine",
    "vllm": "deploy_targets.engines.vllm:VllmEngine",
}
QUANTIZERS = {
    "autoawq": "deploy_targets.quantizers.auto_formats:AutoAwqQuantizer",
    "autogptq": "deploy_targets.quantizers.auto_formats:AutoGptqQuantizer",
    "bitsandbytes": "deploy_targets.quantizers.bitsandbytes:BitsAndBytesQuantizer",
    "compressed-tensors": "deploy_targets.quantizers.compressed_tensors:CompressedTensorsQuantizer",
    "gguf": "deploy_targets.quantizers.gguf:GgufQuantizer",
    "none": "deploy_targets.quantizers.none:NoQuantizer",
    "onnx-float": "deploy_targets.quantizers.onnx_float:OnnxFloatQuantizer",
    "onnx-matmulnbits": "deploy_targets.quantizers.onnx_matmulnbits:OnnxMatMulNBitsQuantizer",
}

_QUANTIZER_PARTS = ("deterministic", "offenders", "quantizes", "quantize", "dequantized", "scaffold")
"""What training needs of one: the proof of a publish, fake quantization and the grey box rest on `dequantized`, say."""
CALL_TIMEOUT_S = 3600.0
"""Longest call of an engine in its own process, where nothing else is said."""


def _find(kind: Literal["engine", "quantizer"], name: str) -> str | PlugIn:
    """`module:Class` of what is shipped, or the plug-in. Raises `UnknownNameError` or `PlugInError`."""
    shipped = ENGINES if kind == "engine" else QUANTIZERS
    plugins, reasons = find_plugins(kind, shipped)
    if name in reasons:
        raise PlugInError(kind, name, reasons[name])
    if name in shipped:
        return shipped[name]
    if name not in plugins:
        raise UnknownNameError(kind, name, {*shipped, *plugins})
    return plugins[name]


def name_problems(kind: Literal["engine", "quantizer"], name: str) -> list[str]:
    """Why nothing can be loaded under this name: one line, or none. Imports at most the package of a plug-in, never its module."""
    try:
        found = _find(kind, name)
    except UsageError as error:
        return [str(error)]
    problem = found.problem() if isinstance(found, PlugIn) else None
    return [f"{kind} {name!r}: {problem}"] if problem else []


def extra_of(profile: TargetProfile) -> str:
    """The pip extra that brings this target's packages on this machine."""
    hardware = profile.hardware
    return hardware.cpu_extra if hardware.cpu_extra and not find_gpus() else hardware.extra


def resolve(kind: Literal["engine", "quantizer"], name: str, extra: str) -> Any:
    """The class registered as `name`.

    Raises `UnknownNameError` (lists the known), `MissingPackageError` (names the pip `extra`) or `PlugInError` (names the package).
    """
    found = _find(kind, name)
    if isinstance(found, PlugIn):
        return found.load()
    module, _, attribute = found.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("deploy_targets", "hetero_rl")):
            raise
        raise MissingPackageError(error.name, f"the {kind} {name!r}", extra or name) from error


def open_engine(profile: TargetProfile, artifact_dir: Path, weight_version: int, call_timeout_s: float = CALL_TIMEOUT_S) -> Engine:
    """Start the profile's engine on a folder in its native format, in this process or in one of its own.

    `call_timeout_s` bounds every call of an engine in its own process: it is stopped, with an `EngineError`, when it hangs.
    """
    start = partial(_start_engine, profile, call_timeout_s)
    if is_rebuilt(profile, artifact_dir):
        from deploy_targets.engines.rebuild import RebuildingEngine

        return RebuildingEngine(start, artifact_dir, weight_version)
    return start(artifact_dir, weight_version)


def is_rebuilt(profile: TargetProfile, model_dir: Path) -> bool:
    """Whether the engine is started anew for every update, as the profile says or as vLLM needs on a CPU; reads the model's `config.json`.

    vLLM 0.32 packs two kinds of weights for its CPU kernels once, and a reload in place does not reach what was packed. The experts of a
    model stay those that were loaded first (UnquantizedFusedMoEMethod._setup_kernel). INT8 layers lose their weights, which
    process_weights_for_onednn sets to None: every log-prob is NaN. This can go when vLLM keeps or repacks them; a GPU needs none of it.
    """
    if profile.engine.publish == "rebuild":
        return True
    if profile.engine.name != "vllm" or find_gpus():
        return False
    return profile.scheme.name == "W8A8" or has_experts(json.loads((model_dir / "config.json").read_text("utf-8")))


def _start_engine(profile: TargetProfile, call_timeout_s: float, artifact_dir: Path, weight_version: int) -> Engine:
    if profile.engine.process == "own":
        from deploy_targets.engines.process import ProcessEngine

        return ProcessEngine(profile, artifact_dir, weight_version, call_timeout_s=call_timeout_s)
    return open_engine_here(profile, artifact_dir, weight_version)


def open_engine_here(profile: TargetProfile, artifact_dir: Path, weight_version: int) -> Engine:
    """Start the profile's engine in this very process."""
    engine_class = resolve("engine", profile.engine.name, extra_of(profile))
    options = {"max_model_len": profile.max_model_len, **profile.engine.options}
    return cast(Engine, engine_class(Path(artifact_dir).resolve(), options, weight_version))


def make_quantizer(profile: TargetProfile, model_dir: Path) -> Quantizer:
    """The profile's quantizer for the model whose `config.json` lies in `model_dir`. Raises `ProfileError` for a scheme it cannot make."""
    quantizer_class = resolve("quantizer", profile.scheme.quantizer, extra_of(profile))
    model_config = json.loads((model_dir / "config.json").read_text("utf-8"))
    quantizer = cast(Quantizer, quantizer_class(profile.scheme, model_config))
    absent = [name for name in _QUANTIZER_PARTS if not hasattr(quantizer, name)]
    if absent:
        parts = [f"{name}: see deploy_targets/protocols.py; the class {quantizer_class.__name__} has none" for name in absent]
        raise ProfileError(f"the quantizer {profile.scheme.quantizer!r} is not whole", parts)
    if profile.scheme.int4_keys() and not isinstance(quantizer, CalibratedQuantizer):
        reason = f"has no effect with the quantizer {profile.scheme.quantizer!r}"
        raise ProfileError("the scheme cannot be made", [f"{key}: {reason}" for key in profile.scheme.int4_keys()])
    return quantizer
