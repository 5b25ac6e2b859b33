"""Train against real vLLM, verify, and load the artifact unchanged in vLLM's own server and in transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy_targets.profile import load_profile
from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, assert_resumes_as_uninterrupted, fails, hetero_rl, with_settings
from tests.vllm_server import vllm_server

pytest.importorskip("vllm.version")
CONFIG = Path(__file__).parents[2] / "configs" / "demo.toml"
NUM_PROMPTS = 64
KEY = "secret"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo config on int4-vllm, cut short; trained once for all tests."""
    folder = tmp_path_factory.mktemp("vllm")
    result = hetero_rl("train", "--target", "int4-vllm", "--config", CONFIG, *with_settings(*SHORT_RUN), "--run-dir", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def greedy(run: Path) -> tuple[list[list[int]], list[str]]:
    """Prompt tokens and right answers of the artifact's task sample."""
    rows = [json.loads(line) for line in (run / "artifact" / "task_sample.jsonl").read_text().splitlines()[:NUM_PROMPTS]]
    return [row["prompt_tokens"] for row in rows], [row["columns"]["answer"] for row in rows]


def decode(run: Path, responses: list[list[int]]) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(run / "artifact" / "tokenizer.json"))
    return [tokenizer.decode(response).strip() for response in responses]


def test_trained_and_exported(run: Path) -> None:
    rows = read_metrics(run)
    assert [row["weights/version"] for row in rows[1:]] == [0, 1, 2, 3]
    assert all(row["engine/nonfinite_logprobs"] == 0 for row in rows[1:])
    assert all(row["publish/proof_gap"] < 0.02 for row in rows[1:])
    assert sha256_of(run / "serving" / "model.safetensors") == sha256_of(run / "artifact" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.fault("resume from an older checkpoint, `int4-vllm`")
def test_resume_equals_uninterrupted(run: Path, tmp_path: Path) -> None:
    """Bit for bit, as long as one CPU serves and learns."""
    assert_resumes_as_uninterrupted(run, tmp_path)


def test_verify_deploy(run: Path, tmp_path: Path) -> None:
    result = hetero_rl("verify-deploy", run / "artifact", "--json", "v.json", cwd=tmp_path)
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["verdict"] in ("pass", "warn"), report["gates"]
    assert result.returncode == 0, result.stderr
    assert report["engine"]["name"] == "vllm"
    assert report["task_accuracy"] == pytest.approx(read_metrics(run)[-1]["eval/deployed_accuracy"], abs=0.05)


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's server on the artifact; it wants a key, and its log-probs are those that it gives by default."""
    log = tmp_path_factory.mktemp("server") / "serve.log"
    with vllm_server(load_profile("int4-vllm"), run / "artifact", log, "--api-key", KEY, "--served-model-name", "demo") as url:
        yield url


@pytest.mark.slow
def test_verify_deploy_asks_the_server_that_runs(run: Path, server: str, tmp_path: Path) -> None:
    """What it measures through the server is what it measures on an engine of its own."""
    assert hetero_rl("export", run / "artifact", "--bundle", "out.tar.zst", cwd=tmp_path).returncode == 0
    command = ("verify-deploy", "out.tar.zst", "--server", server)
    fails(hetero_rl(*command, cwd=tmp_path), 2, "401", "HETERO_RL_API_KEY")
    fails(hetero_rl(*command, "--model", "other", cwd=tmp_path, HETERO_RL_API_KEY=KEY), 2, "does not serve the model 'other'", "'demo'")
    asked = hetero_rl(*command, "--json", "server.json", cwd=tmp_path, HETERO_RL_API_KEY=KEY)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert hetero_rl("verify-deploy", "out.tar.zst", "--json", "own.json", cwd=tmp_path).returncode == 0
    report, own = (json.loads((tmp_path / name).read_text()) for name in ("server.json", "own.json"))
    assert report["engine"]["versions"]["vllm"] == vllm_version()
    assert report["engine"]["server"]["max_model_len"] == load_profile("int4-vllm").max_model_len
    assert report["artifact_sha256"] == own["artifact_sha256"]
    assert report["gap"]["num_tokens"] == own["gap"]["num_tokens"]
    assert report["gap"]["mean"] == pytest.approx(own["gap"]["mean"], rel=0.1)
    assert report["task_accuracy"] == pytest.approx(own["task_accuracy"], abs=0.03)


def vllm_version() -> str:
    from vllm import version

    return str(version.__version__)


@pytest.mark.slow
def test_artifact_loads_unchanged_in_vllms_server(run: Path, server: str, greedy: tuple[list[list[int]], list[str]]) -> None:
    """Asked by OpenAI's own client, as applications ask it."""
    import openai

    prompts, answers = greedy
    client = openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, timeout=120)
    completion = client.completions.create(model="demo", prompt=prompts, max_tokens=8, temperature=0, extra_body={"return_token_ids": True})
    client.close()
    choices = sorted(completion.choices, key=lambda choice: choice.index)
    responses = [choice.model_extra["token_ids"] for choice in choices]
    solved = [text == answer for text, answer in zip(decode(run, responses), answers, strict=True)]
    assert sum(solved) / len(solved) == pytest.approx(read_metrics(run)[-1]["eval/deployed_accuracy"], abs=0.05)


def test_artifact_loads_unchanged_in_transformers(run: Path, greedy: tuple[list[list[int]], list[str]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompts, answers = greedy
    model = AutoModelForCausalLM.from_pretrained(run / "artifact", dtype=torch.bfloat16)
    ids = torch.tensor(prompts)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    solved = [text == answer for text, answer in zip(decode(run, out[:, ids.shape[1] :].tolist()), answers, strict=True)]
    assert sum(solved) / len(solved) == pytest.approx(read_metrics(run)[-1]["eval/deployed_accuracy"], abs=0.08)
