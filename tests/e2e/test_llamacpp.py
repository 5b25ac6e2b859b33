"""Train against real llama.cpp, export, verify, and let llama.cpp's own high-level interface solve the task from the file alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy_targets.gguf_file import GGUF_FILE
from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, hetero_rl, with_settings

llama_cpp = pytest.importorskip("llama_cpp")
CONFIG = Path(__file__).parents[2] / "configs" / "demo.toml"
NUM_PROMPTS = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo config on q4_k_m-llamacpp, cut short; trained once for all tests."""
    folder = tmp_path_factory.mktemp("llamacpp")
    settings = with_settings(*SHORT_RUN)
    result = hetero_rl("train", "--target", "q4_k_m-llamacpp", "--config", CONFIG, *settings, "--run-dir", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_trained_and_exported(run: Path, tmp_path: Path) -> None:
    rows = read_metrics(run)
    assert [row["weights/version"] for row in rows[1:]] == [0, 1, 2, 3]
    assert all(row["engine/nonfinite_logprobs"] == 0 for row in rows[1:])
    assert all(row["publish/proof_gap"] < 0.02 for row in rows[1:])
    result = hetero_rl("export", run, "--out", tmp_path / "again", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    served = sha256_of(run / "serving" / GGUF_FILE)
    assert sha256_of(run / "artifact" / GGUF_FILE) == sha256_of(tmp_path / "again" / GGUF_FILE) == served
    assert not list((run / "artifact").glob("*.safetensors"))


def test_verify_deploy(run: Path, tmp_path: Path) -> None:
    result = hetero_rl("verify-deploy", run / "artifact", "--json", "v.json", cwd=tmp_path)
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["verdict"] in ("pass", "warn"), report["gates"]
    assert result.returncode == 0, result.stderr
    assert report["engine"]["name"] == "llamacpp"
    assert report["task_accuracy"] == pytest.approx(read_metrics(run)[-1]["eval/deployed_accuracy"], abs=0.05)


def test_llama_cpp_solves_the_task_from_the_file_alone(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "artifact" / "task_sample.jsonl").read_text().splitlines()[:NUM_PROMPTS]]
    loaded = llama_cpp.Llama(str(run / "artifact" / GGUF_FILE), n_ctx=64, n_threads=1, verbose=False)
    try:
        solved = 0
        for row in rows:
            assert loaded.tokenize(row["prompt"].encode(), add_bos=False) == row["prompt_tokens"]
            answer = loaded.create_completion(row["prompt_tokens"], max_tokens=8, temperature=0.0)
            solved += answer["choices"][0]["text"].strip() == row["columns"]["answer"]
    finally:
        loaded.close()
    assert solved / len(rows) == pytest.approx(read_metrics(run)[-1]["eval/deployed_accuracy"], abs=0.15)
