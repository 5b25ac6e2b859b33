"""What must answer at once does: no heavy import before a command runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import hetero_rl

HEAVY = (
    "model_signing", "torch", "transformers", "deepspeed", "vllm", "onnxruntime", "llama_cpp", "datasets", "matplotlib", "pandas", "ray",
)  # fmt: skip
HEAVY_TO_VERIFY = ("torch", "transformers", "deepspeed", "vllm", "llama_cpp")
HELP_CPU_S = 0.4
VERIFY_CPU_S = 0.5


VERIFY = ("hetero_rl.commands", "deploy_targets.bundle", "deploy_targets.engines.server")
"""What `verify-deploy` imports before it looks at an artifact, and by the way to a server."""


@pytest.mark.parametrize(
    "module", ["hetero_rl.cli", "hetero_rl.config", "deploy_targets", "deploy_targets.catalog", "deploy_targets.artifact", *VERIFY]
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_verify_needs_no_torch() -> None:
    """What the serving box imports to check and to measure an ONNX artifact."""
    modules = ("verify", "report", "preflight", "engines.onnxruntime")
    names = ", ".join(f"deploy_targets.{module}" for module in modules)
    code = f"import sys, {names}, hetero_rl.tasks.rewards; print([name for name in {HEAVY_TO_VERIFY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", [(), ("train",), ("verify-deploy",), ("probe",), ("eval",), ("export",), ("report",), ("targets",), ("doctor",)]
)
def test_help(command: tuple[str, ...], tmp_path: Path) -> None:
    result = hetero_rl(*command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "Usage" in result.stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """The program as it is run, not only its modules: what `python -m hetero_rl --help` has imported when it ends."""
    command = [sys.executable, "-X", "importtime", "-m", "hetero_rl", "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Usage" in result.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert {"hetero_rl", "typer"} <= imported
    assert imported.isdisjoint(HEAVY), imported & set(HEAVY)


def test_help_answers_at_once() -> None:
    assert is_quick(("-m", "hetero_rl", "--help"), HELP_CPU_S)


def test_verify_imports_at_once() -> None:
    """What `verify-deploy` imports before it opens a bundle."""
    assert is_quick(("-c", f"import {', '.join(VERIFY)}"), VERIFY_CPU_S)


def is_quick(arguments: tuple[str, ...], limit_s: float) -> bool:
    """CPU time of a fresh process, best of five, is below `limit_s`, or on a busy machine below twice what the libraries it needs take."""
    ours, theirs = ([cpu_s(sys.executable, *side) for _ in range(5)] for side in (arguments, ("-c", "import numpy, pydantic, typer")))
    return min(ours) < max(limit_s, 2 * min(theirs))


def cpu_s(*command: str) -> float:
    """User and system time of a process, seconds."""
    to_nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    _, status, usage = os.wait4(os.posix_spawn(command[0], command, os.environ, file_actions=to_nowhere), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_utime + usage.ru_stime


def test_targets(tmp_path: Path) -> None:
    listed = hetero_rl("targets", "list", cwd=tmp_path)
    assert listed.returncode == 0
    for name in ("int4-onnx", "int4-vllm", "bf16-transformers", "fake"):
        assert name in listed.stdout
    shown = hetero_rl("targets", "show", "int4-onnx", cwd=tmp_path)
    assert 'name = "int4-onnx"' in shown.stdout
    (tmp_path / "copy.toml").write_text(shown.stdout)
    assert hetero_rl("targets", "check", "copy.toml", cwd=tmp_path).returncode == 0


def test_doctor(tmp_path: Path) -> None:
    result = hetero_rl("doctor", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("python", "cpu", "torch", "int4-vllm"):
        assert word in result.stdout


def test_version(tmp_path: Path) -> None:
    assert hetero_rl("--version", cwd=tmp_path).stdout.strip() == "0.1.0"
