"""Train against real vLLM, verify, and load the artifact unchanged in vLLM's own server and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy_targets.profile import load_profile
from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, hetero_rl, with_settings
from tests.vllm_server import vllm_server

pytest.importorskip("vllm.version")
CONFIG = Path(__file__).parents[2] / "configs" / "demo.toml"
NUM_PROMPTS = 64


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


def test_verify_deploy(run: Path, tmp_path: Path) -> None:
    result = hetero_rl("verify-deploy", run / "artifact", "--json", "v.json", cwd=tmp_path)
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["verdict"] in ("pass", "warn"), report["gates"]
    assert result.returncode == 0, result.stderr
    assert report["engine"]["name"] == "vllm"
    assert report["task_accuracy"] == pytest.approx(read_metrics(run)[-1]["eval/deployed_accuracy"], abs=0.05)


@pytest.mark.slow
def test_artifact_loads_unchanged_in_vllms_server(run: Path, greedy: tuple[list[list[int]], list[str]], tmp_path: Path) -> None:
    """Asked by OpenAI's own client, as applications ask it."""
    import openai

    prompts, answers = greedy
    with vllm_server(load_profile("int4-vllm"), run / "artifact", tmp_path / "serve.log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        completion = client.completions.create(
            model=str(run / "artifact"), prompt=prompts, max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
        )
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
