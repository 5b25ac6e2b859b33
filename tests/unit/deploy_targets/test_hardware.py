"""The machine as it is, without any heavy package."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from deploy_targets.hardware import CPU_FEATURES, describe_machine, find_gpus, package_versions


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


def fake_tool(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_gpus_are_those_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake_tool(tmp_path, "echo 'NVIDIA H200, 143771 MiB'; echo 'NVIDIA L4, 23034 MiB'")
    assert find_gpus() == ("NVIDIA H200, 143771 MiB", "NVIDIA L4, 23034 MiB")


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="has a GPU")
def test_a_broken_driver_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake_tool(tmp_path, "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9")
    assert find_gpus() == ()
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["nvidia-smi"], check=True, capture_output=True)


def test_versions_of_what_is_installed() -> None:
    assert package_versions(["numpy", "no-such-distribution"]) == {"numpy": np.__version__}
