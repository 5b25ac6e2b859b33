"""A serving box has the engine and this package, and nothing of what trains: no torch, no transformers, no DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy_targets.bundle import write_bundle
from deploy_targets.weights_file import sha256_of
from tests.artifacts import VERSION, make_artifact, seal
from tests.command_line import environment_of, hetero_rl
from tests.conftest import TinyModels
from tests.contract.targets import make_target
from tests.servers import fake_server

ROOT = Path(__file__).parents[2]
TRAINS = ("torch", "transformers", "deepspeed", "vllm", "datasets", "accelerate", "onnx")
BLOCKER = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TRAINS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def bundle_of(target: str, tiny_models: TinyModels, folder: Path) -> Path:
    """A tiny model quantized for `target`, with probes that its own engine answered here, as one file."""
    pytest.importorskip({"int4-onnx": "onnx", "q4_0-llamacpp": "llama_cpp"}[target])
    made = make_target(target, tiny_models("qwen3"), folder)
    engine = made.open()
    seal(made.folder, engine, made.profile)
    engine.close()
    write_bundle(made.folder, folder / "out.tar.zst")
    return folder / "out.tar.zst"


@pytest.fixture(scope="module")
def onnx_bundle(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("int4-onnx", tiny_models, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def llamacpp_bundle(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("q4_0-llamacpp", tiny_models, tmp_path_factory.mktemp("llamacpp"))


@pytest.mark.parametrize("engine", ["onnx", "llamacpp"])
def test_a_bundle_verifies_where_nothing_that_trains_can_be_imported(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(f"{engine}_bundle")
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join(filter(None, (str(tmp_path / "absent"), str(ROOT), os.environ.get("PYTHONPATH"))))
    blocked = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment_of({"PYTHONPATH": path}), capture_output=True, check=False
    )
    assert b"No module named 'torch'" in blocked.stderr
    result = hetero_rl("verify-deploy", bundle, "--json", "v.json", "--html", "v.html", cwd=tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "v.json").read_text())["verdict"] == "pass"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with `hetero-rl[onnx]` in it, installed from a copy of this repository as from the package index."""
    folder = tmp_path_factory.mktemp("box")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("deploy_targets", "hetero_rl"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    command = [folder / "env" / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{source}[onnx]"]
    done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True, check=False)
    if "Failed to establish a new connection" in done.stderr or "Temporary failure in name resolution" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return folder / "env" / "bin"


def clean() -> dict[str, str]:
    """The environment without what makes this repository's own packages importable."""
    return {name: value for name, value in environment_of({}).items() if name != "PYTHONPATH"}


def on_box(box: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [box / "hetero-rl", *map(str, arguments)], cwd=cwd, env=clean(), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_the_engines_extra_is_enough(box: Path, onnx_bundle: Path, tmp_path: Path) -> None:
    code = f"import importlib.util as util; print([name for name in {TRAINS!r} if util.find_spec(name)])"
    found = subprocess.run([box / "python", "-c", code], cwd=tmp_path, env=clean(), capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    result = on_box(box, "verify-deploy", onnx_bundle, "--json", "v.json", "--html", "v.html", "--keep", "artifact", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["verdict"] == "pass"
    assert report["artifact_sha256"] == sha256_of(tmp_path / "artifact" / "manifest.json")
    assert "torch" not in report["engine"]["versions"]
    assert "onnxruntime" in report["engine"]["versions"]
    assert "<svg" in (tmp_path / "v.html").read_text()


@pytest.mark.slow
def test_a_server_is_measured_without_any_engine(box: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen3"), tmp_path / "artifact", accuracy=None)
    with fake_server(tmp_path / "artifact", "vllm", VERSION) as server:
        result = on_box(box, "verify-deploy", "artifact", "--server", server.url, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
