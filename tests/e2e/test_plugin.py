"""The example of docs/example_plugin, installed from outside the repository and used as any other target."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, environment_of, fails, hetero_rl, with_settings
from tests.plugins import lay_out, profile, python_path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "example_plugin"
NAME = "int8-rows"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH with the installed package."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "copy")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "copy")], check=True, timeout=120)
    assert (folder / "site" / "int8_rows" / "int8-rows.toml").is_file()
    return python_path(folder / "site")


def test_it_is_a_target_among_the_others(path: str, tmp_path: Path) -> None:
    listed = hetero_rl("targets", "list", cwd=tmp_path, PYTHONPATH=path).stdout.splitlines()
    assert [NAME, "W8A16", NAME] in [line.split()[:3] for line in listed]
    assert NAME not in hetero_rl("targets", "list", cwd=tmp_path).stdout
    assert hetero_rl("targets", "check", NAME, cwd=tmp_path, PYTHONPATH=path).returncode == 0
    shown = hetero_rl("targets", "show", NAME, cwd=tmp_path, PYTHONPATH=path).stdout
    assert shown == (EXAMPLE / "int8_rows" / "int8-rows.toml").read_text("utf-8")


@pytest.mark.slow
def test_it_trains_exports_and_verifies(path: str, tmp_path: Path) -> None:
    # Eight bits: the floor is so small that four steps of learning move the gap by about as much.
    settings = with_settings(*SHORT_RUN, "constraint.tolerance=3")
    arguments = ("train", "--target", NAME, "--config", ROOT / "configs" / "demo.toml", *settings, "--run-dir", "run")
    trained = hetero_rl(*arguments, cwd=tmp_path, PYTHONPATH=path)
    assert trained.returncode == 0, trained.stderr
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == 4
    assert rows[-1]["publish/rebuilds"] == 0
    assert all(row["engine/nonfinite_logprobs"] == 0 for row in rows[1:])
    assert 0 < rows[-1]["constraint/engine_gap"] < 0.01
    exported = hetero_rl("export", "run", "--out", "again", cwd=tmp_path, PYTHONPATH=path)
    assert exported.returncode == 0, exported.stderr
    weights = [tmp_path / folder / "model.safetensors" for folder in ("run/serving", "run/artifact", "again")]
    assert len({sha256_of(file) for file in weights}) == 1
    verified = hetero_rl("verify-deploy", "run/artifact", "--json", "verdict.json", cwd=tmp_path, PYTHONPATH=path)
    assert verified.returncode == 0, verified.stdout
    assert json.loads((tmp_path / "verdict.json").read_text())["verdict"] in ("pass", "warn")
    # Where the package is missing, nothing reads the int8 values as weights.
    fails(hetero_rl("verify-deploy", "run/artifact", cwd=tmp_path), 2, f"unknown engine {NAME!r}")
    with pytest.raises(ValueError, match="int8-rows-qwen3"):
        AutoConfig.from_pretrained(tmp_path / "run" / "artifact")


@pytest.mark.slow
@pytest.mark.variant
def test_it_passes_the_contract_suite(path: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/contract",
        "--target",
        NAME,
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(tmp_path),
    ]
    result = subprocess.run(
        command, cwd=ROOT, env=environment_of({"PYTHONPATH": path}), capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


def test_a_second_package_of_the_same_name_is_refused(path: str, tmp_path: Path) -> None:
    other = lay_out(tmp_path / "site", "another-int8-rows", {"other/int8-rows.toml": profile(NAME)}, profiles=f"{NAME} = other")
    both = path + f":{other}"
    for arguments in (("targets", "check", NAME), ("train", "--target", NAME)):
        fails(hetero_rl(*arguments, cwd=tmp_path, PYTHONPATH=both), 2, "'another-int8-rows', 'int8-rows'", "taken twice")
    assert hetero_rl("targets", "list", cwd=tmp_path, PYTHONPATH=both).returncode == 0
