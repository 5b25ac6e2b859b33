"""A machine with GPUs, wherever the tests run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from deploy_targets import hardware


@pytest.fixture
def nvidia_smi(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`nvidia_smi("NVIDIA L4, 23034 MiB, 8.9")`: puts a tool of that name in front, which prints these lines.

    `before` is shell code that it runs first.
    """

    def install(*lines: str, before: str = "", exit_code: int = 0) -> None:
        folder = tmp_path_factory.mktemp("bin")
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{before}\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {exit_code}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        hardware._installed_gpus.cache_clear()

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield install
    hardware._installed_gpus.cache_clear()
