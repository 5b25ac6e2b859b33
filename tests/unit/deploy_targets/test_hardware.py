"""The machine as it is, without any heavy package."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy_targets.hardware import CPU_FEATURES, describe_machine, find_gpus, gpu_compute_capability, gpu_memory_gib, package_versions
from deploy_targets.preflight import check_target
from deploy_targets.profile import shipped_profiles

NvidiaSmi = Callable[..., None]


def test_the_machine_is_this_one() -> None:
    machine = describe_machine()
    assert machine.cpu
    assert 1 <= machine.num_cores <= (os.cpu_count() or 1)
    assert machine.memory_gib * 2**30 == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), abs=2**27)
    assert set(machine.cpu_features) <= set(CPU_FEATURES)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="compares with Linux's own words")
def test_cpu_features_are_those_of_the_kernel() -> None:
    words = set(Path("/proc/cpuinfo").read_text().split())
    assert describe_machine().cpu_features == tuple(feature for feature in CPU_FEATURES if feature in words)


def test_gpus_are_those_nvidia_smi_lists(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi("NVIDIA H200, 143771 MiB, 9.0", "NVIDIA L4, 23034 MiB, 8.9")
    assert find_gpus() == ("NVIDIA H200, 143771 MiB", "NVIDIA L4, 23034 MiB")
    assert gpu_memory_gib() == 23034 / 1024
    assert gpu_compute_capability() == 8.9
    nvidia_smi("NVIDIA B200, 183359 MiB, 10.0")
    assert gpu_compute_capability() == 10


FOUR = tuple(f"NVIDIA {name}, {size} MiB, 9.0, GPU-{name}" for name, size in (("A", 1024), ("B", 2048), ("C", 4096), ("D", 8192)))


@pytest.mark.parametrize(
    ("devices", "visible"),
    [
        ("", ""), ("-1", ""), ("0", "A"), ("2,1", "CB"), (" 3 , 0", "DA"), ("0,-1,2", "A"), ("1,7,2", "B"), ("GPU-C", "C"),
        ("GPU-D,GPU-B", "DB"), ("GPU-X,0", ""), ("NoDevFiles", ""), ("MIG-1234", "A"),
    ],
)  # fmt: skip
def test_hidden_gpus_are_not_there(devices: str, visible: str, nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(*FOUR)
    assert len(find_gpus()) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert [gpu.split(",")[0][-1] for gpu in find_gpus()] == list(visible)
    assert gpu_memory_gib() == min((2.0 ** "ABCD".index(name) for name in visible), default=None)


def test_the_tool_is_run_once(nvidia_smi: NvidiaSmi, tmp_path: Path) -> None:
    nvidia_smi("NVIDIA L4, 23034 MiB, 8.9", before=f"echo run >> {tmp_path / 'runs'}")
    for _ in range(2):
        for profile in shipped_profiles().values():
            check_target(profile)
    assert (tmp_path / "runs").read_text().split() == ["run"]


def test_a_tool_that_does_not_know_compute_capabilities_is_asked_without(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(
        "Tesla V100, 16160 MiB", before='case "$1" in *compute_cap*) echo "Field \\"compute_cap\\" is not a valid field"; exit 2;; esac'
    )
    assert find_gpus() == ("Tesla V100, 16160 MiB",)
    assert gpu_compute_capability() is None


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="has a GPU")
def test_a_broken_driver_is_no_gpu(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi("NVIDIA-SMI has failed because it could not communicate with the driver", exit_code=9)
    assert find_gpus() == ()
    assert gpu_compute_capability() is None
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["nvidia-smi"], check=True, capture_output=True)


def test_versions_of_what_is_installed() -> None:
    assert package_versions(["numpy", "no-such-distribution"]) == {"numpy": np.__version__}
