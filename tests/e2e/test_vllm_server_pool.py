"""vLLM's own server, started by somebody else, in the pool of a run: it is given the weights, samples, and is left with what ships."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from deploy_targets.catalog import make_quantizer
from deploy_targets.engines.http_json import JsonServer
from deploy_targets.engines.remote_vllm import RemoteVllmEngine
from deploy_targets.engines.server import ServerEngine
from deploy_targets.errors import EngineError, UsageError
from deploy_targets.profile import load_profile
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from deploy_targets.weights_file import sha256_of, write_version
from hetero_rl.metrics import read_metrics
from hetero_rl.model import resolve_model
from tests.command_line import SHORT_RUN, at_step, environment_of, hetero_rl, with_settings
from tests.ports import free_port
from tests.vllm_server import vllm_server

pytest.importorskip("vllm.version")
PROFILE = load_profile("int4-vllm")
KEY = "secret"
PROMPTS = [[3, 4, 5], [3, 4, 5], [6], [7, 8]]
SEQUENCES = [TokenSequence((3, 4, 5, 6, 7, 8), 1)]


@dataclass
class Served:
    """A server, and the folder that it was started on."""

    url: str
    folder: Path


OPTIONS = (
    "--api-key", KEY, "--logprobs-mode", "processed_logprobs", "--max-logprobs", "4096", "--dtype", "bfloat16",
    "--max-model-len", "1025", "--hf-overrides", '{"max_position_embeddings": 1025}',
)  # fmt: skip
"""As docs/scale.md has them."""


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model before any step, as the server takes it."""
    folder, model = tmp_path_factory.mktemp("server") / "start", resolve_model("demo")
    folder.mkdir()
    tensors = load_file(model / WEIGHTS_FILE)
    quantizer = make_quantizer(PROFILE, model)
    write_version(folder / WEIGHTS_FILE, quantizer, tensors.items(), model, 4 * len(tensors) + 16)
    quantizer.scaffold(model, folder)
    return folder


@pytest.fixture(scope="module")
def server(untrained: Path) -> Iterator[Served]:
    with vllm_server(PROFILE, untrained, untrained.parent / "serve.log", *OPTIONS, VLLM_SERVER_DEV_MODE="1") as url:
        yield Served(url, untrained)


@pytest.fixture
def engine(server: Served, tmp_path: Path) -> Iterator[RemoteVllmEngine]:
    opened = RemoteVllmEngine(PROFILE, server.folder, 3, url=server.url, api_key=KEY, folder=tmp_path)
    yield opened
    opened.close()


@pytest.mark.slow
def test_what_it_samples_it_scores_alike(engine: RemoteVllmEngine, tmp_path: Path) -> None:
    """At a temperature at which log-probs before and after it differ; each call draws by its seed, and each draw by its own."""
    prompts = PROMPTS + [[9]] * 8
    sampling = Sampling(6, 0.7, 11)
    made = engine.generate(prompts, sampling)
    assert [list(one.prompt) for one in made] == prompts
    for one, scores in zip(made, engine.score([one.sequence for one in made], 0.7), strict=True):
        np.testing.assert_allclose(one.logps, scores.logps, atol=0.1)
        assert (one.weight_version, one.temperature, one.finish_reason, len(one.tokens)) == (3, 0.7, "length", 6)
    drawn = [tuple(one.tokens.tolist()) for one in made]
    assert drawn == [tuple(one.tokens.tolist()) for one in engine.generate(prompts, sampling)]
    assert drawn != [tuple(one.tokens.tolist()) for one in engine.generate(prompts, Sampling(6, 0.7, 12))]
    stop = int(made[0].tokens[2])
    ended = engine.generate(prompts, Sampling(6, 0.7, 11, (stop,)))[0]
    assert (ended.finish_reason, ended.tokens[-1]) == ("stop", stop)
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] == [f"{engine._token}-3"]


@pytest.mark.slow
def test_a_folder_that_it_does_not_see_costs_it_nothing(server: Served, engine: RemoteVllmEngine, tmp_path: Path) -> None:
    before = engine.score(SEQUENCES)[0].logps
    with pytest.raises(UsageError, match=r"cannot read /nowhere/at/all/.*`folder_there`"):
        RemoteVllmEngine(PROFILE, server.folder, 4, url=server.url, api_key=KEY, folder=tmp_path, folder_there="/nowhere/at/all")
    np.testing.assert_array_equal(engine.score(SEQUENCES)[0].logps, before)


@pytest.mark.slow
def test_who_took_it_over_is_found_out(server: Served, engine: RemoteVllmEngine, tmp_path: Path) -> None:
    other = RemoteVllmEngine(PROFILE, server.folder, 0, url=server.url, api_key=KEY, folder=tmp_path)
    for call in (
        lambda: engine.score(SEQUENCES),
        lambda: engine.generate(PROMPTS, Sampling(2)),
        lambda: engine.update(WeightFile(server.folder / WEIGHTS_FILE, 4)),
    ):
        with pytest.raises(EngineError, match="another run took it over"):
            call()
    assert other.score(SEQUENCES)[0].weight_version == 0
    other.close()


@pytest.mark.slow
def test_its_key_guards_no_weights(server: Served) -> None:
    """As docs/security.md says of vLLM 0.32; once this fails, the docs can say better."""
    nobody = JsonServer(server.url, None, 30)
    with pytest.raises(UsageError, match="401"):
        nobody.get("/v1/models")
    assert nobody.post("/collective_rpc", {"method": "check_health"}) == {"results": [None]}
    nobody.close()


@pytest.mark.slow
@pytest.mark.variant
@pytest.mark.fault("a vLLM server is killed in mid-run, and started anew by somebody on the weights of before")
def test_a_server_that_is_started_anew_in_mid_run(untrained: Path, tmp_path: Path) -> None:
    """An engine here goes on alone; the server comes back by an update that it proves."""
    port = free_port()
    (tmp_path / "key").write_text(KEY)
    entries = f'[[engines]]\nurl = "http://127.0.0.1:{port}"\nserver = "vllm"\ntoken_file = "key"\n[[engines]]\n'
    (tmp_path / "pool.toml").write_text(f"{entries}[pool]\nrestart_after_s = 2\n")

    def serving(log: str) -> AbstractContextManager[str]:
        return vllm_server(PROFILE, untrained, tmp_path / log, *OPTIONS, port=port, VLLM_SERVER_DEV_MODE="1")

    settings = with_settings(*SHORT_RUN, "loop.num_steps=2000", "evaluation.every_steps=2000", "checkpoint.every_steps=100")
    command = ["train", "--target", "int4-vllm", *settings, "--config", "pool.toml", "--run-dir", "run"]
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        first.enter_context(serving("first.log"))
        process = subprocess.Popen(
            [sys.executable, "-m", "hetero_rl", *command], cwd=tmp_path, env=environment_of({}), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        stack.callback(process.kill)
        at_step(tmp_path / "run", 2, process)
        first.close()
        stack.enter_context(serving("second.log"))
        num_before = len(read_metrics(tmp_path / "run"))
        deadline = time.monotonic() + 300
        while not any(row["engines/restarts"] and row["engines/serving"] == 2 for row in read_metrics(tmp_path / "run")[num_before:]):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 143, out
    assert f"engine http://127.0.0.1:{port} is out" in out
    assert f"engine http://127.0.0.1:{port} is back" in out
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert {row["engines/serving"] for row in rows[1:]} == {1, 2}


@pytest.mark.slow
def test_a_run_that_it_serves(server: Served, tmp_path: Path) -> None:
    """Every update is proven on it, the gap stays that of the kernels, and what ships is what it serves at the end."""
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "pool.toml").write_text(f'[[engines]]\nurl = "{server.url}"\nserver = "vllm"\ntoken_file = "key"\n')
    at_start = scores_of(server, server.folder)
    settings = with_settings(*SHORT_RUN, "learner.lr=3e-4")
    result = hetero_rl("train", "--target", "int4-vllm", *settings, "--config", "pool.toml", "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["weights/version"] for row in rows[1:]] == [0, 1, 2, 3]
    assert all(row["publish/proof_gap"] < 0.02 for row in rows[1:])
    assert all(row["constraint/engine_gap"] < 2 * row["constraint/floor"] for row in rows[1:])
    assert all(row["engines/serving"] == 1 and row["engine/nonfinite_logprobs"] == 0 for row in rows[1:])
    assert sha256_of(tmp_path / "run" / "serving" / WEIGHTS_FILE) == sha256_of(tmp_path / "run" / "artifact" / WEIGHTS_FILE)
    assert not list((tmp_path / "run" / "updates").iterdir())
    with closing(JsonServer(server.url, KEY, 30)) as http:
        label = http.get("/weight_info")["weight_version"]
    assert label.startswith("hetero-rl ")
    assert label.endswith(" 4")
    verified = hetero_rl("verify-deploy", "run/artifact", "--server", server.url, cwd=tmp_path, HETERO_RL_API_KEY=KEY)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert np.abs(scores_of(server, tmp_path / "run" / "artifact") - at_start).max() > 0.01, "the weights of the start would not differ"


def scores_of(server: Served, artifact: Path) -> np.ndarray:
    """What it answers to anybody."""
    asked = ServerEngine(server.url, artifact, 0, max_model_len=64, api_key=KEY)
    scores = asked.score(SEQUENCES)[0].logps
    asked.close()
    return scores
