"""Which device of this machine a target computes on, from its profile alone."""

from __future__ import annotations

from deploy_targets.engines.onnx_options import needs_nvidia_gpu
from deploy_targets.hardware import find_gpus
from deploy_targets.profile import TargetProfile


def needs_gpu(profile: TargetProfile) -> bool:
    """Whether the target runs on a CUDA GPU and nowhere else: by its hardware, or by an option that names one."""
    options = profile.engine.options
    return "cpu" not in profile.hardware.devices or str(options.get("device", "")).startswith("cuda") or needs_nvidia_gpu(options)


def runs_on_gpu(profile: TargetProfile) -> bool:
    """Whether the target computes on a GPU here: it needs one, or it may use one, there is one, and its engine takes it.

    True as well where a needed GPU is missing, which `preflight.check_target` says.
    """
    if needs_gpu(profile):
        return True
    if "cuda" not in profile.hardware.devices or not find_gpus():
        return False
    options = profile.engine.options
    match profile.engine.name:
        case "transformers":
            return bool(options.get("device", "auto") == "auto")
        case "onnxruntime":
            return False  # its provider is none of NVIDIA's
        case "llamacpp":
            return bool(options.get("num_gpu_layers"))
    return True
