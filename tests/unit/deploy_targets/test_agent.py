"""The target agent over real HTTP, with a real ONNX Runtime: the same answers as here, and nothing for those who may not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from deploy_targets.agent import service
from deploy_targets.agent.command import parse_binding, read_token
from deploy_targets.agent.service import NUM_WRONG_TOKENS
from deploy_targets.catalog import open_engine_here
from deploy_targets.deltas import packed, unpack
from deploy_targets.engines.outbox import Outbox
from deploy_targets.engines.remote import RemoteEngine
from deploy_targets.errors import EngineError, UsageError
from deploy_targets.profile import load_profile
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from deploy_targets.weights_file import sha256_of, write_weights
from tests.agents import TOKEN, Agent, running_agent
from tests.conftest import TinyModels
from tests.onnx_artifacts import checkpoint, make_artifact, quantizer
from tests.wire import Wire

PROFILE = load_profile("int4-onnx")
PROMPTS = [[5, 6, 7], [8], [8], [30, 29]]
SEQUENCES = [TokenSequence((5, 6, 7, 8), 1), TokenSequence((9, 10, 11), 2)]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("qwen3")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(model, tmp_path_factory.mktemp("artifact") / "made")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with running_agent(PROFILE, tmp_path_factory.mktemp("agent")) as running:
        yield running


@pytest.fixture
def engine(agent: Agent, folder: Path) -> Iterator[RemoteEngine]:
    opened = RemoteEngine(PROFILE, folder, 3, url=agent.url, token=TOKEN)
    yield opened
    opened.close()


def moved(model: Path, out: Path, share: float) -> Path:
    """The weights after a step that changed a share of them."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor + 0.05 * (torch.rand(tensor.shape, generator=generator) < share).to(tensor.dtype)
        for name, tensor in checkpoint(model).items()
    }
    write_weights(out, quantizer(model).quantize(tensors.items()), num_tensors_max=200)
    return out


def test_answers_are_bit_for_bit_those_of_the_engine_here(engine: RemoteEngine, folder: Path, model: Path, tmp_path: Path) -> None:
    here = open_engine_here(PROFILE, folder, 3)
    weights = moved(model, tmp_path / "next", 0.01)
    for version in (3, 4):
        for sampling in (Sampling(6, 0.7, 11, (4, 9)), Sampling(1, 0.0)):
            for ours, theirs in zip(here.generate(PROMPTS, sampling), engine.generate(PROMPTS, sampling), strict=True):
                assert (ours.prompt, ours.finish_reason, ours.temperature) == (theirs.prompt, theirs.finish_reason, theirs.temperature)
                assert theirs.weight_version == version
                np.testing.assert_array_equal(ours.tokens, theirs.tokens)
                np.testing.assert_array_equal(ours.logps, theirs.logps)
        for mine, other in zip(here.score(SEQUENCES, 0.7), engine.score(SEQUENCES, 0.7), strict=True):
            np.testing.assert_array_equal(mine.logps, other.logps)
            np.testing.assert_array_equal(mine.greedy_tokens, other.greedy_tokens)
        if version == 3:
            assert here.update(WeightFile(weights, 4)) == engine.update(WeightFile(weights, 4)) == 4
    here.close()


def test_what_changed_is_sent_and_no_more(engine: RemoteEngine, model: Path, tmp_path: Path) -> None:
    before = dict(engine.bytes_sent)
    weights = moved(model, tmp_path / "next", 0.001)
    engine.update(WeightFile(weights, 4))
    assert engine.bytes_sent["whole"] == before["whole"]
    assert 0 < engine.bytes_sent["delta"] < weights.stat().st_size / 5


def test_an_engine_that_comes_back_is_sent_what_changed_meanwhile(agent: Agent, folder: Path, model: Path, tmp_path: Path) -> None:
    """A pool's outbox outlives its engines, and the agent what it holds."""
    outbox = Outbox()
    RemoteEngine(PROFILE, folder, 3, url=agent.url, token=TOKEN, outbox=outbox).close()
    shutil.copytree(folder, tmp_path / "artifact")
    shutil.move(moved(model, tmp_path / "next", 0.001), tmp_path / "artifact" / WEIGHTS_FILE)
    again = RemoteEngine(PROFILE, tmp_path / "artifact", 4, url=agent.url, token=TOKEN, outbox=outbox)
    assert again.bytes_sent["whole"] == 0
    assert 0 < again.bytes_sent["delta"] < (folder / WEIGHTS_FILE).stat().st_size / 5
    assert again.generate(PROMPTS, Sampling(2))[0].weight_version == 4
    again.close()


def test_a_base_that_the_agent_lost_is_sent_whole(engine: RemoteEngine, agent: Agent, model: Path, folder: Path, tmp_path: Path) -> None:
    agent.host._path(sha256_of(folder / WEIGHTS_FILE)).unlink()
    engine.update(WeightFile(moved(model, tmp_path / "next", 0.001), 4))
    assert engine.bytes_sent["delta"] == 0
    assert engine.generate(PROMPTS, Sampling(2))[0].weight_version == 4


@pytest.mark.fault("agent: replayed update")
def test_a_version_is_taken_once(engine: RemoteEngine, folder: Path) -> None:
    for version in (3, 2):
        with pytest.raises(EngineError, match=f"version {version} is not newer than 3"):
            engine.update(WeightFile(folder / WEIGHTS_FILE, version))


@pytest.mark.fault("agent: request of another run")
def test_another_run_takes_the_engine_over(engine: RemoteEngine, agent: Agent, folder: Path) -> None:
    other = RemoteEngine(PROFILE, folder, 0, url=agent.url, token=TOKEN)
    assert other.bytes_sent == {"whole": 0, "delta": 0}, "the files were there"
    with pytest.raises(EngineError, match="another run has started this agent's engine"):
        engine.generate(PROMPTS, Sampling(2))
    assert other.generate(PROMPTS, Sampling(2))[0].weight_version == 0
    other.close()


def test_mistakes_of_the_caller_come_back_as_such(engine: RemoteEngine) -> None:
    with pytest.raises(UsageError, match=r"(?s)the agent at http.*within max_model_len 512"):
        engine.generate([[5] * 5000], Sampling(2))


@pytest.mark.fault("agent: its engine is killed")
def test_an_engine_that_is_killed_is_said_to_be_and_starts_anew(engine: RemoteEngine, agent: Agent, folder: Path) -> None:
    psutil.Process(agent.host._engine.pid).kill()  # type: ignore[union-attr]
    for _ in range(2):
        with pytest.raises(EngineError, match="agent at http"):
            engine.generate(PROMPTS, Sampling(2))
    again = RemoteEngine(PROFILE, folder, 9, url=agent.url, token=TOKEN)
    assert again.generate(PROMPTS, Sampling(2))[0].weight_version == 9
    again.close()


def test_another_targets_weights_are_refused(agent: Agent, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"serves the target 'int4-onnx', whose scheme differs: bits: 4 here, 8 sent"):
        RemoteEngine(load_profile("int8-onnx"), folder, 0, url=agent.url, token=TOKEN)


@pytest.mark.fault("agent: cut off amid an update")
def test_a_body_that_is_cut_off_changes_nothing(engine: RemoteEngine, agent: Agent, model: Path, tmp_path: Path) -> None:
    expected = [g.tokens.tolist() for g in engine.generate(PROMPTS, Sampling(5))]
    weights = moved(model, tmp_path / "next", 0.5)
    body = b"".join(packed(weights, None))
    port = int(agent.url.rpartition(":")[2])
    for sent in (0, 10, len(body) // 2):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = (
                f"PUT /v1/files/{sha256_of(weights)} HTTP/1.1",
                "Host: x",
                f"Authorization: Bearer {TOKEN}",
                f"Content-Length: {len(body)}",
            )
            connection.sendall("\r\n".join([*head, "", ""]).encode() + body[:sent])
    assert not agent.host.has(sha256_of(weights))
    assert [g.tokens.tolist() for g in engine.generate(PROMPTS, Sampling(5))] == expected
    engine.update(WeightFile(weights, 4))
    assert not list(agent.host._files.glob("*.partial"))


@pytest.mark.fault("agent: the network breaks amid an update")
@pytest.mark.parametrize("num_bytes", [0, 100, 20_000])
def test_a_network_that_breaks_in_the_middle_of_an_update(agent: Agent, folder: Path, model: Path, tmp_path: Path, num_bytes: int) -> None:
    """What is served stays as it was, and once the network is back the same engine takes the same update."""
    weights = moved(model, tmp_path / "next", 0.5)
    here = open_engine_here(PROFILE, folder, 3)
    with Wire(int(agent.url.rpartition(":")[2])) as wire:
        engine = RemoteEngine(PROFILE, folder, 3, url=f"http://127.0.0.1:{wire.port}", token=TOKEN)
        assert len(b"".join(packed(weights, folder / WEIGHTS_FILE))) > 30_000, "the break would come after the end"
        assert engine.score(SEQUENCES)[0].weight_version == 3
        wire.bytes_left = num_bytes
        with pytest.raises(EngineError, match="cannot be reached"):
            engine.update(WeightFile(weights, 4))
        assert wire.num_breaks >= 1
        assert (engine.weight_version, agent.host.weight_version, agent.host.has(sha256_of(weights))) == (3, 3, False)
        wire.bytes_left = None
        for version in (3, 4):
            for ours, theirs in zip(here.score(SEQUENCES), engine.score(SEQUENCES), strict=True):
                np.testing.assert_array_equal(ours.logps, theirs.logps)
                assert theirs.weight_version == version
            if version == 3:
                assert here.update(WeightFile(weights, 4)) == engine.update(WeightFile(weights, 4)) == 4
        engine.close()
    here.close()
    assert not list(agent.host._files.glob("*.partial"))


@pytest.mark.fault("agent: oversized request")
def test_a_request_is_as_long_as_allowed_at_most(engine: RemoteEngine, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_JSON_BYTES", 10_000)
    assert_says(post(agent, "score", {"lease": "x" * 10_001}), "a request of more than 10000 bytes", 413)
    assert engine.score(SEQUENCES)[0].weight_version == 3


@pytest.mark.fault("agent: garbage bytes that are no HTTP")
def test_what_is_no_http(engine: RemoteEngine, agent: Agent) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00" * 50, os.urandom(4096), b"POST / HTTP/9.9\r\n\r\n", b"\x00" * 70_000):
        with socket.create_connection(("127.0.0.1", int(agent.url.rpartition(":")[2])), 10) as connection, suppress(ConnectionError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            assert b" 200 " not in connection.recv(100)
    assert engine.score(SEQUENCES)[0].weight_version == 3


@pytest.mark.fault("agent: garbage or damaged bytes for a file")
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"garbage", "cannot be unpacked"),
        (b"", "damaged on the way, or cut off"),
        (b"".join(packed(Path(__file__), None))[:-20], "damaged on the way, or cut off|cannot be unpacked"),
    ],
    ids=["garbage", "nothing", "too_short"],
)
def test_files_that_are_not_what_they_are_said_to_be(agent: Agent, body: bytes, says: str) -> None:
    answer = put(agent, sha256_of(Path(__file__)), body)
    assert_says(answer, says, 422)
    assert not agent.host.has(sha256_of(Path(__file__)))


@pytest.mark.fault("agent: oversized body, packed and unpacked")
def test_a_file_is_as_long_as_allowed_at_most(agent: Agent, tmp_path: Path) -> None:
    """Packed, and unpacked: a gigabyte of zeros is a few kilobytes on the way."""
    assert_says(put(agent, "0" * 64, os.urandom((1 << 26) + 1)), "a file of more than 67108864 bytes", 413)
    bomb = tmp_path / "zeros"
    with open(bomb, "wb") as file:
        file.truncate((1 << 26) + 1)
    assert_says(put(agent, "0" * 64, b"".join(packed(bomb, None))), "unpacks to more than 67108864 bytes", 422)


@pytest.mark.fault("agent: names that leave the folder")
@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\b", ""])
def test_names_stay_below_their_folder(agent: Agent, name: str) -> None:
    files = {name: "0" * 64, WEIGHTS_FILE: "0" * 64}
    scheme = PROFILE.scheme.model_dump(mode="json")
    assert_says(post(agent, "start", {"files": files, "weight_version": 0, "scheme": scheme}), "names that leave the folder", 400)


@pytest.mark.fault("agent: names that leave the folder")
@pytest.mark.parametrize("sha256", ["..%2f..%2fetc%2fpasswd", "x" * 64, "0" * 63, "A" * 64])
def test_a_file_has_a_hash_for_a_name(agent: Agent, sha256: str) -> None:
    assert put(agent, sha256, b"").status_code in (400, 404)


@pytest.mark.fault("agent: garbage bytes for a request")
@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'{"lease": 3}', b"[" * 100_000, b'{"lease": "", "prompts": 1, "sampling": {}}'], ids=repr
)
def test_requests_that_are_none(engine: RemoteEngine, agent: Agent, body: bytes) -> None:
    for call in ("start", "update", "generate", "score"):
        answer = httpx.post(f"{agent.url}/v1/{call}", content=body, headers=HEADERS, timeout=30, trust_env=False)
        assert answer.status_code in (400, 409), answer.text
        assert "Traceback" not in answer.text


def test_a_wrong_lease_or_shape_in_a_request_is_one_error(engine: RemoteEngine, agent: Agent) -> None:
    request = {"lease": engine._lease, "prompts": [["x"]], "sampling": {"max_tokens": 1, "stop_token_ids": []}}
    assert post(agent, "generate", request).status_code == 400
    assert_says(post(agent, "generate", {**request, "lease": "other"}), "another run", 409)


@pytest.mark.fault("agent: wrong token")
def test_nobody_enters_without_the_token(agent: Agent, folder: Path, tmp_path: Path) -> None:
    with running_agent(PROFILE, tmp_path) as other:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            for path in ("/metrics", "/v1/files/" + "0" * 64, "/nowhere"):
                assert httpx.get(other.url + path, headers=headers, trust_env=False).status_code == 401
        with pytest.raises(UsageError, match=r"does not accept the token \(401\)"):
            RemoteEngine(PROFILE, folder, 0, url=other.url, token="another-token")
        for _ in range(NUM_WRONG_TOKENS):
            httpx.get(other.url + "/metrics", trust_env=False)
        answer = httpx.get(other.url + "/metrics", headers=HEADERS, trust_env=False)
        assert answer.status_code == 429, "a guess is not told from the token any more"
        assert httpx.get(other.url + "/health", trust_env=False).json() == {"status": "ok", "target": "int4-onnx", "weight_version": None}


def test_wrong_tokens_close_the_door_to_their_address_alone(folder: Path, tmp_path: Path) -> None:
    """Nobody else is kept out; and who is, in the middle of a run, is an engine that fails, which others stand in for."""
    with running_agent(PROFILE, tmp_path) as agent:
        engine = RemoteEngine(PROFILE, folder, 0, url=agent.url, token=TOKEN)
        there = httpx.HTTPTransport(local_address="127.0.0.9")
        with httpx.Client(transport=there) as other:
            answers = [other.get(agent.url + "/metrics").status_code for _ in range(NUM_WRONG_TOKENS + 1)]
            assert answers == [401] * NUM_WRONG_TOKENS + [429]
        assert engine.score(SEQUENCES)[0].weight_version == 0
        for _ in range(NUM_WRONG_TOKENS):
            httpx.get(agent.url + "/metrics", trust_env=False)
        with pytest.raises(EngineError, match=r"does not accept the token \(429\)"):
            engine.score(SEQUENCES)
        engine.close()


@pytest.mark.fault("agent: its disk is full")
def test_a_full_disk_is_said(engine: RemoteEngine, agent: Agent, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    weights = moved(model, tmp_path / "next", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(agent.host, "receive", full)
        with pytest.raises(EngineError, match=r"agent at http.*cannot be written: .*No space left on device"):
            engine.update(WeightFile(weights, 4))
    assert engine.update(WeightFile(weights, 4)) == 4


def test_metrics(engine: RemoteEngine, agent: Agent) -> None:
    def shown() -> dict[str, float]:
        lines = httpx.get(agent.url + "/metrics", headers=HEADERS, trust_env=False).text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    name = 'hetero_rl_agent_tokens_total{call="score"}'
    before = shown()
    engine.score(SEQUENCES)
    assert shown()[name] - before.get(name, 0.0) == 4
    assert shown()["hetero_rl_agent_weight_version"] == 3


def test_tls(folder: Path, tmp_path: Path) -> None:
    certificate = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate[0], "-keyout", certificate[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    with running_agent(PROFILE, tmp_path / "agent", certificate=certificate) as agent:
        engine = RemoteEngine(PROFILE, folder, 1, url=agent.url, token=TOKEN, ca_file=certificate[0])
        assert engine.score(SEQUENCES)[0].weight_version == 1
        engine.close()
        with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED"):
            RemoteEngine(PROFILE, folder, 1, url=agent.url, token=TOKEN)


@pytest.mark.parametrize(
    ("url", "says"),
    [("127.0.0.1:1", "no address"), ("ftp://x", "no address"), ("http://u:p@x", "no address"), ("http://127.0.0.1:1", "cannot be reached")],
)
def test_addresses(folder: Path, url: str, says: str) -> None:
    with pytest.raises((UsageError, EngineError), match=says):
        RemoteEngine(PROFILE, folder, 0, url=url, token=TOKEN)


def test_what_answers_may_be_something_else(folder: Path, tmp_path: Path) -> None:
    """A server that knows none of our paths."""
    with running_agent(PROFILE, tmp_path) as agent, pytest.raises(EngineError, match=r"no target agent|status 404"):
        RemoteEngine(PROFILE, folder, 0, url=f"{agent.url}/elsewhere", token=TOKEN)


def test_the_difference_of_files_of_other_lengths(tmp_path: Path) -> None:
    old, new, out = (tmp_path / name for name in ("old", "new", "out"))
    for old_len, new_len in ((0, 10), (10, 0), (100, 9_000_000), (9_000_000, 100), (5_000_000, 5_000_000)):
        old.write_bytes(os.urandom(old_len))
        new.write_bytes(os.urandom(new_len))
        assert unpack(BytesIO(b"".join(packed(new, old))), out, old, 1 << 26) == hashlib.sha256(new.read_bytes()).hexdigest()
        assert out.read_bytes() == new.read_bytes()
    shutil.copy(new, old)
    assert len(b"".join(packed(new, old))) < 2000


def test_a_token_file_is_private_and_long(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(UsageError, match=r"cannot be read: No such file.*token_hex"):
        read_token(path)
    path.touch(0o600)
    for text in ("", "short", "with a space in it all", "ümläuts-are-no-header-"):
        path.write_text(text)
        with pytest.raises(UsageError, match="at least 16 printable"):
            read_token(path)
    path.write_text(TOKEN + "\n")
    assert read_token(path) == TOKEN
    path.chmod(0o640)
    with pytest.raises(UsageError, match="can be read by others: chmod 600"):
        read_token(path)


def test_bindings(tmp_path: Path) -> None:
    for address in ("127.0.0.1:8470", "localhost:1", "[::1]:8470"):
        assert parse_binding(address, None, None, plain_http=False).url.startswith("http://")
    with pytest.raises(UsageError, match=r"0\.0\.0\.0 can be reached from other machines"):
        parse_binding("0.0.0.0:8470", None, None, plain_http=False)
    assert parse_binding("0.0.0.0:8470", None, None, plain_http=True).port == 8470
    for wrong in ("8470", "127.0.0.1", "127.0.0.1:x", ":1", "127.0.0.1:99999"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            parse_binding(wrong, None, None, plain_http=False)
    with pytest.raises(UsageError, match="go together"):
        parse_binding("127.0.0.1:1", tmp_path / "c", None, plain_http=False)
    with pytest.raises(UsageError, match="does not exist"):
        parse_binding("127.0.0.1:1", tmp_path / "c", tmp_path / "k", plain_http=False)


def put(agent: Agent, sha256: str, body: bytes) -> httpx.Response:
    return httpx.put(f"{agent.url}/v1/files/{sha256}", content=body, headers=HEADERS, timeout=60, trust_env=False)


def post(agent: Agent, call: str, body: object) -> httpx.Response:
    return httpx.post(f"{agent.url}/v1/{call}", content=json.dumps(body), headers=HEADERS, timeout=60, trust_env=False)


def assert_says(answer: httpx.Response, text: str, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert re.search(text, answer.json()["error"]["message"]), answer.text
