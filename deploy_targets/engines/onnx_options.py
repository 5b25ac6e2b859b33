"""What an ONNX target can be told, and whether this machine has its execution provider: readable without ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from deploy_targets.engines.requests import EngineOptions

CPU_PROVIDER = "CPUExecutionProvider"
_NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


class OnnxRuntimeOptions(EngineOptions):
    """The `[engine.options]` table of an ONNX target."""

    num_threads: int | None = Field(None, ge=1)
    """Cores to use; all that this process may use by default."""
    threads_per_batch: int = Field(1, ge=1)
    """Cores that share one batch. More than one pays where there are more cores than full batches, or for single requests."""
    max_batch_size: int = Field(128, ge=1)
    """Rows of one batch; there are num_threads / threads_per_batch batches at a time."""
    execution_provider: str = CPU_PROVIDER
    """ONNX Runtime's name of the provider. Beyond the CPU, inputs and the cache are copied to the device and back at every token."""


def needs_nvidia_gpu(options: Mapping[str, Any]) -> bool:
    """Whether the execution provider named in `[engine.options]` is one of NVIDIA's."""
    return options.get("execution_provider") in _NVIDIA


def missing_provider(options: Mapping[str, Any]) -> list[str]:
    """Why the execution provider named in `[engine.options]` is not to be had on this machine: one line, or none.

    ONNX Runtime is imported (about 0.2 s) only for a provider other than the CPU's, which every build has.
    """
    provider = str(options.get("execution_provider", CPU_PROVIDER))
    if provider == CPU_PROVIDER or importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    known = onnxruntime.get_available_providers()
    return [] if provider in known else [provider_problem(provider, known)]


def provider_problem(provider: str, known: list[str]) -> str:
    """The message for a `provider` that is not among the `known` ones of the installed onnxruntime."""
    line = f"execution_provider {provider!r} is not in this build of onnxruntime, which has {', '.join(known)}"
    if provider not in _NVIDIA:
        return line
    return f"{line}; uninstall the package onnxruntime, whose folder it shares, then: pip install 'hetero-rl[onnx-gpu]'"
