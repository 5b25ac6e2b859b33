"""A vLLM server that takes updates, played by one of ours: what is asked of it, and one clear error for each way in which it can be wrong.

The real one samples, scores and trains in tests/e2e/test_vllm_server_pool.py.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from deploy_targets.engines import http_json
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.engines.pool import Place, PoolEngine, PoolRules
from deploy_targets.engines.remote_vllm import RemoteVllmEngine
from deploy_targets.errors import DeployTargetsError, EngineError, UsageError
from deploy_targets.profile import load_profile
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from tests.conftest import TinyModels
from tests.servers import FakeServer, fake_server, send

PROFILE = load_profile("bf16-vllm").model_copy(update={"max_model_len": 64})
SEQUENCES = [TokenSequence((3, 13, 4, 17, 9, 2), 3), TokenSequence((5, 6), 1)]
INFO: dict[str, Any] = {
    "vllm_config": {
        "model_config": {"quantization": None, "dtype": "torch.bfloat16", "logprobs_mode": "processed_logprobs", "max_logprobs": 4096},
        "cache_config": {"cache_dtype": "auto"},
    },
    "vllm_env": {"VLLM_CPU_INT4_W4A8": True},
}


class Rl:
    """vLLM's RL endpoints before the fake server; the folders that it is told to read are really read."""

    def __init__(self, behind: FakeServer) -> None:
        self.behind, self.info, self.dev_mode = behind, copy.deepcopy(INFO), True
        self.label, self.cache_is_held, self.fails_to_load = "default", False, False
        self.loaded: list[list[str]] = []

    def __call__(self, handler: BaseHTTPRequestHandler) -> bool:
        path, body = handler.path.partition("?")[0], self.behind.requests[-1][1]
        answers: dict[str, Callable[[], Any]] = {
            "/server_info": lambda: self.info,
            "/weight_info": lambda: {"weight_version": self.label},
            "/update_weight_version": lambda: self._rename(body["new_version"]),
            "/collective_rpc": lambda: self._load(**body["kwargs"]),
            "/reset_prefix_cache": lambda: {"success": not self.cache_is_held},
        }
        if path not in answers or not self.dev_mode:
            return False
        answer = answers[path]()
        send(handler, 500 if answer is None else 200, answer or {"error": {"message": "Worker failed with error 'Repo id must be'"}})
        return True

    def _rename(self, label: str) -> Any:
        self.label = label
        return {"success": True}

    def _load(self, weights_path: str, is_checkpoint_format: bool) -> Any:
        files = list(Path(weights_path).glob("*.safetensors"))
        if not files or (is_checkpoint_format and self.fails_to_load):
            return None
        with safe_open(files[0], framework="pt") as file:
            self.loaded.append(sorted(file.keys()))
        return {"results": [None]}


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models("qwen3")


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(http_json, "_PAUSE_S", 0.001)
    with fake_server(folder, "vllm", 3) as running:
        running.before = Rl(running)
        yield running


@pytest.fixture
def rl(server: FakeServer) -> Rl:
    assert isinstance(server.before, Rl)
    return server.before


@pytest.fixture
def start(server: FakeServer, folder: Path, tmp_path: Path) -> Iterator[Callable[..., RemoteVllmEngine]]:
    opened: list[RemoteVllmEngine] = []

    def start(weight_version: int = 3, **options: Any) -> RemoteVllmEngine:
        given = {"url": server.url, "folder": tmp_path / "updates", "call_timeout_s": 30.0, **options}
        opened.append(RemoteVllmEngine(given.pop("profile", PROFILE), folder, weight_version, **given))
        return opened[-1]

    yield start
    for engine in opened:
        engine.close()


def fails(kind: type[DeployTargetsError], act: Callable[[], object], *fragments: str) -> None:
    with pytest.raises(kind) as caught:
        act()
    for fragment in fragments:
        assert fragment in str(caught.value), caught.value


def test_it_is_brought_to_the_weights_and_says_so(start: Callable[..., RemoteVllmEngine], rl: Rl, folder: Path, tmp_path: Path) -> None:
    engine = start()
    nothing, all_of_it = rl.loaded
    assert nothing == []
    assert "model.embed_tokens.weight" in all_of_it
    assert rl.label.endswith(" 3")
    for version in (4, 5):
        assert engine.update(WeightFile(folder / WEIGHTS_FILE, version)) == engine.weight_version == version
        assert rl.label.endswith(f" {version}")
        assert len(list((tmp_path / "updates").iterdir())) == 1, "what is served; the version before it is gone"
    expected = FakeEngine(folder, {}, 5).score(SEQUENCES)
    for got, want in zip(engine.score(SEQUENCES), expected, strict=True):
        np.testing.assert_array_equal(got.logps, want.logps)
        assert got.weight_version == 5
    assert engine.generate([[3, 4]], Sampling(4, 0.0))[0].weight_version == 5
    engine.close()
    engine.close()
    assert not list((tmp_path / "updates").iterdir())


def test_draws_of_one_prompt_are_one_request_with_a_seed_of_its_own(start: Callable[..., RemoteVllmEngine], server: FakeServer) -> None:
    engine = start()
    server.change = lambda path, answer: {"choices": []} if path == "/v1/completions" else answer
    for seed in (1, 1, 2):
        fails(EngineError, lambda s=seed: engine.generate([[5], [5], [6]], Sampling(4, 0.7, s)), "answered 0 of")
    bodies = [body for path, body in server.requests if path == "/v1/completions"]
    asked = {(body["prompt"][0][0], body["n"], body["seed"], body["temperature"]) for body in bodies}
    assert {(prompt, n, temperature) for prompt, n, _, temperature in asked} == {(5, 2, 0.7), (6, 1, 0.7)}
    assert len(asked) == 4, "two prompts under two seeds, and the same call asks for the same"
    assert len({seed for _, _, seed, _ in asked}) == 4


# How it was started


def test_without_the_endpoints(start: Callable[..., RemoteVllmEngine], rl: Rl) -> None:
    rl.dev_mode = False
    fails(UsageError, start, "has no /server_info", "VLLM_SERVER_DEV_MODE=1", "docs/scale.md")


@pytest.mark.parametrize(
    ("table", "key", "value", "says"),
    [
        ("model_config", "logprobs_mode", "raw_logprobs", "are raw_logprobs, not those it samples by: --logprobs-mode processed_logprobs"),
        ("model_config", "quantization", "compressed-tensors", "in the format compressed-tensors, not None"),
        ("model_config", "max_logprobs", 20, "--max-logprobs 36"),
        ("model_config", "dtype", "torch.float16", "it computes in float16: --dtype bfloat16"),
        ("cache_config", "cache_dtype", "fp8", "its KV cache is fp8: --kv-cache-dtype auto"),
    ],
)
def test_another_start_than_the_target_wants(
    start: Callable[..., RemoteVllmEngine], rl: Rl, table: str, key: str, value: Any, says: str
) -> None:
    rl.info["vllm_config"][table][key] = value
    fails(UsageError, start, "was not started for this target", says)
    assert not rl.loaded
    assert rl.label == "default", "nothing was touched"


def test_everything_that_is_wrong_is_said_at_once(start: Callable[..., RemoteVllmEngine], rl: Rl, server: FakeServer) -> None:
    rl.info["vllm_config"]["model_config"] |= {"logprobs_mode": "raw_logits", "dtype": "torch.float32"}
    rl.info["vllm_env"]["VLLM_CPU_INT4_W4A8"] = False
    server.max_model_len = 63
    fails(UsageError, start, "raw_logits", "float32", "--max-model-len 65", "VLLM_CPU_INT4_W4A8=1")
    server.max_model_len, at_its_limit = 512, PROFILE.model_copy(update={"max_model_len": 512})
    fails(UsageError, lambda: start(profile=at_its_limit), """--max-model-len 513 --hf-overrides '{"max_position_embeddings": 513}'""")
    del rl.info["vllm_config"]["cache_config"]
    fails(EngineError, start, "GET /server_info", "cache_config")


def test_addresses_and_keys(start: Callable[..., RemoteVllmEngine], server: FakeServer, tmp_path: Path) -> None:
    fails(UsageError, lambda: start(url="10.0.0.5:8000"), "is no address of a server")
    fails(EngineError, lambda: start(url="http://127.0.0.1:1"), "connection refused")
    fails(EngineError, lambda: start(url=server.url + "/elsewhere"), "It must be vLLM's OpenAI-compatible server")
    fails(UsageError, lambda: start(url="https://127.0.0.1:1", ca_file=tmp_path / "none.pem"), "none.pem", "cannot be read")
    server.key = "secret"
    server.before, rl = lambda handler: False, server.before
    fails(UsageError, start, "401", "set token_file to it")
    fails(UsageError, lambda: start(api_key="guess"), "401", "does not accept the key in token_file")
    server.before = rl
    server.models = ("one", "two")
    fails(UsageError, lambda: start(api_key="secret"), "serves 2 models")


def test_a_folder_that_it_does_not_see(start: Callable[..., RemoteVllmEngine], rl: Rl, tmp_path: Path) -> None:
    fails(UsageError, lambda: start(folder_there="/nowhere"), "cannot read /nowhere/", str(tmp_path), "`folder_there`", "Repo id must be")
    assert not rl.loaded
    assert rl.label == "default"
    start(folder_there=str(tmp_path / "updates"))


# While it serves


def test_a_server_that_was_started_anew_is_found_out(start: Callable[..., RemoteVllmEngine], rl: Rl, folder: Path) -> None:
    """It answers as ever, with the weights of its start."""
    engine = start()
    rl.label = "default"
    fails(EngineError, lambda: engine.score(SEQUENCES), "its label is 'default'", "started anew")
    fails(EngineError, lambda: engine.generate([[3]], Sampling(2, 0.0)), "started anew")
    fails(EngineError, lambda: engine.update(WeightFile(folder / WEIGHTS_FILE, 4)), "started anew")


def test_the_pool_brings_it_back_with_the_weights_of_now(start: Callable[..., RemoteVllmEngine], rl: Rl, folder: Path) -> None:
    said: list[str] = []
    places = [Place("server", lambda _, version: start(version)), Place("here", lambda _, version: FakeEngine(folder, {}, version))]
    pool = PoolEngine(places, folder, 3, rules=PoolRules(restart_after_s=0.0), say=said.append)
    rl.label = "default"
    assert len(pool.score(SEQUENCES * 4)) == 8
    assert pool.num_serving == 1
    assert "started anew" in said[0]
    deadline = time.monotonic() + 20
    while rl.label == "default" or pool.num_serving < 2:
        assert time.monotonic() < deadline
        pool.update(WeightFile(folder / WEIGHTS_FILE, pool.weight_version + 1))
        time.sleep(0.05)
    assert rl.label.endswith(f" {pool.weight_version}")
    assert said[-1] == "engine server is back"
    pool.close()


def test_a_load_that_fails_is_the_end_of_the_server(start: Callable[..., RemoteVllmEngine], rl: Rl, folder: Path) -> None:
    engine = start()
    rl.fails_to_load = True
    fails(EngineError, lambda: engine.update(WeightFile(folder / WEIGHTS_FILE, 4)), "cannot be trusted any more", "start it anew")
    fails(EngineError, lambda: start(), "cannot be trusted any more")
    assert rl.label.endswith(" loading"), "nobody takes it for one that serves"


def test_requests_of_somebody_else_keep_the_old_cache(start: Callable[..., RemoteVllmEngine], rl: Rl, folder: Path) -> None:
    engine = start()
    rl.cache_is_held = True
    fails(EngineError, lambda: engine.update(WeightFile(folder / WEIGHTS_FILE, 4)), "did not drop its prefix cache", "serves one run")


def test_a_file_of_another_model_is_not_sent(
    start: Callable[..., RemoteVllmEngine], rl: Rl, tmp_path: Path, tiny_models: TinyModels
) -> None:
    engine = start()
    other = tiny_models("qwen3", tied=True) / WEIGHTS_FILE
    before = len(rl.loaded)
    fails(EngineError, lambda: engine.update(WeightFile(other, 4)), "does not fit the model in service", "lm_head.weight: missing")
    assert len(rl.loaded) == before
    assert engine.score(SEQUENCES)[0].weight_version == 3


def test_garbage_for_an_answer(start: Callable[..., RemoteVllmEngine], server: FakeServer) -> None:
    engine, rl = start(), server.before
    server.before = lambda handler: handler.path == "/weight_info" and (send(handler, 200, b"\xff{") or True)
    fails(EngineError, lambda: engine.score(SEQUENCES), "not JSON")
    server.before = lambda handler: handler.path == "/weight_info" and (send(handler, 200, json.dumps([1]).encode()) or True)
    fails(EngineError, lambda: engine.score(SEQUENCES), "GET /weight_info")
    server.before = rl
    assert len(engine.score(SEQUENCES)) == 2
