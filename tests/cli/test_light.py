"""What must answer at once does: no heavy import before a command runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import hetero_rl

HEAVY = ("torch", "transformers", "deepspeed", "vllm", "onnxruntime", "datasets", "matplotlib")


@pytest.mark.parametrize(
    "module", ["hetero_rl.cli", "hetero_rl.config", "deploy_targets", "deploy_targets.catalog", "deploy_targets.artifact"]
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_verify_needs_no_torch() -> None:
    """What the serving box imports to check and to measure an ONNX artifact."""
    modules = ("verify", "report", "preflight", "engines.onnxruntime")
    names = ", ".join(f"deploy_targets.{module}" for module in modules)
    code = f"import sys, {names}, hetero_rl.tasks.rewards; print([name for name in {HEAVY[:4]!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [(), ("train",), ("verify-deploy",), ("eval",), ("export",), ("report",), ("targets",), ("doctor",)])
def test_help(command: tuple[str, ...], tmp_path: Path) -> None:
    result = hetero_rl(*command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "Usage" in result.stdout


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
