"""A running server is measured as an engine is, and whatever it answers wrongly is one clear error."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy_targets.engines import http_json
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.engines.server import ServerEngine
from deploy_targets.errors import DeployTargetsError, EngineError, UsageError
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from tests.artifacts import VERSION
from tests.conftest import TinyModels
from tests.models import EOS_ID
from tests.servers import Answer, FakeServer, fake_server, send

GREEDY = Sampling(max_tokens=6, temperature=0.0, stop_token_ids=(EOS_ID,))
PROMPTS = [[3, 13, 4], [5, 6, 7, 8], [9]]
SEQUENCES = [TokenSequence((3, 13, 4, 17, 9, 2), 3), TokenSequence((5, 6), 1), TokenSequence((7, 8, 9, 10), 2)]


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models("qwen3")


@pytest.fixture(params=["vllm", "llamacpp"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[FakeServer]:
    with fake_server(folder, request.param, VERSION) as running:
        yield running


@pytest.fixture
def vllm(folder: Path) -> Iterator[FakeServer]:
    with fake_server(folder, "vllm", VERSION) as running:
        yield running


@pytest.fixture
def llamacpp(folder: Path) -> Iterator[FakeServer]:
    with fake_server(folder, "llamacpp", VERSION) as running:
        yield running


OPENED: list[ServerEngine] = []


@pytest.fixture(autouse=True)
def _no_pauses_and_all_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(http_json, "_PAUSE_S", 0.001)
    yield
    while OPENED:
        OPENED.pop().close()


def ask(server: FakeServer, folder: Path, **options: Any) -> ServerEngine:
    OPENED.append(ServerEngine(server.url, folder, VERSION, max_model_len=256, **{"timeout_s": 30.0, **options}))
    return OPENED[-1]


def fails(kind: type[DeployTargetsError], act: Callable[[], object], *fragments: str) -> None:
    with pytest.raises(kind) as caught:
        act()
    for fragment in fragments:
        assert fragment in str(caught.value), caught.value


def test_it_scores_and_generates_as_the_engine_behind_it(server: FakeServer, folder: Path) -> None:
    engine, behind = ask(server, folder), FakeEngine(folder, {}, VERSION)
    for got, expected in zip(engine.score(SEQUENCES), behind.score(SEQUENCES), strict=True):
        np.testing.assert_array_equal(got.logps, expected.logps)
        np.testing.assert_array_equal(got.greedy_tokens, expected.greedy_tokens)
        assert (got.logps.dtype, got.greedy_tokens.dtype) == (np.float32, np.int32)
        assert (got.weight_version, got.temperature) == (VERSION, 1.0)
    for got, expected in zip(engine.generate(PROMPTS, GREEDY), behind.generate(PROMPTS, GREEDY), strict=True):
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_array_equal(got.logps, expected.logps)
        assert (got.prompt, got.finish_reason, got.temperature) == (expected.prompt, expected.finish_reason, 0.0)
    engine.close()
    engine.close()


def test_it_says_what_it_asked(server: FakeServer, folder: Path) -> None:
    found = ask(server, folder).server
    version = {"vllm": "0.32.0", "llamacpp": "b7000-abc"}[server.software]
    assert (found.url, found.model, found.software, found.version) == (server.url, "tiny", server.software, version)
    assert (found.max_model_len, found.is_local) == ({"vllm": 512, "llamacpp": 511}[server.software], True)


def test_nothing_is_left_to_the_servers_defaults(vllm: FakeServer, folder: Path) -> None:
    engine = ask(vllm, folder)
    engine.score(SEQUENCES)
    engine.generate(PROMPTS, GREEDY)
    bodies = [body for path, body in vllm.requests if path == "/v1/completions"]
    assert len(bodies) == 2
    for body in bodies:
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        assert neutral.items() <= body.items()
        assert (body["temperature"], body["ignore_eos"], body["model"]) == (0.0, True, "tiny")


def test_an_address_may_end_in_v1(server: FakeServer, folder: Path) -> None:
    server.url += "/v1/"
    assert len(ask(server, folder).score(SEQUENCES)) == len(SEQUENCES)


def test_another_temperature_by_the_whole_vocabulary(vllm: FakeServer, folder: Path) -> None:
    expected = FakeEngine(folder, {}, VERSION).score(SEQUENCES, 0.7)
    for got, want in zip(ask(vllm, folder).score(SEQUENCES, 0.7), expected, strict=True):
        np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)
        assert got.temperature == 0.7


def test_another_temperature_is_not_to_be_had_of_llamacpp(llamacpp: FakeServer, folder: Path) -> None:
    fails(UsageError, lambda: ask(llamacpp, folder).score(SEQUENCES, 0.7), "at temperature 1", "0.7", "cannot be measured")


def test_what_a_server_is_not_asked(server: FakeServer, folder: Path) -> None:
    engine = ask(server, folder)
    fails(UsageError, lambda: engine.update(WeightFile(folder / WEIGHTS_FILE, 4)), "measured, not changed")
    fails(UsageError, lambda: engine.generate(PROMPTS, Sampling(4, 1.0)), "greedy")
    assert not [path for path, _ in server.requests if "completion" in path]


def test_probes_longer_than_the_server_takes(server: FakeServer, folder: Path) -> None:
    """vLLM generates one more token than it scores, and llama.cpp never fills a slot."""
    server.max_model_len = 6
    fails(UsageError, lambda: ask(server, folder).score(SEQUENCES), "sequence 0: 6 tokens > max_model_len 5")
    assert all(len(made.prompt) + len(made.tokens) <= 6 for made in ask(server, folder).generate(PROMPTS, GREEDY))


# What goes wrong before anything is measured


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://[::1", "http://key@host", "http://host/?a=b", ""]
)
def test_what_is_no_address(folder: Path, url: str) -> None:
    fails(UsageError, lambda: ServerEngine(url, folder, VERSION, max_model_len=8), "is no address of a server")


def test_no_server(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    fails(EngineError, lambda: ServerEngine(url, folder, VERSION, max_model_len=8), url, "connection refused")


def test_no_host(folder: Path) -> None:
    fails(EngineError, lambda: ServerEngine("http://no-such-host.invalid", folder, VERSION, max_model_len=8), "is not known")


def test_keys(server: FakeServer, folder: Path) -> None:
    server.key = "secret"
    fails(UsageError, lambda: ask(server, folder), "401", "set HETERO_RL_API_KEY")
    fails(UsageError, lambda: ask(server, folder, api_key="other"), "401", "does not accept the key in HETERO_RL_API_KEY")
    fails(UsageError, lambda: ask(server, folder, api_key="a\nb"), "HETERO_RL_API_KEY", "line breaks")
    assert ask(server, folder, api_key="secret").score(SEQUENCES)


def test_models(vllm: FakeServer, folder: Path) -> None:
    fails(UsageError, lambda: ask(vllm, folder, model="large"), "does not serve the model 'large'", "'tiny'")
    vllm.models = ("tiny", "large")
    fails(UsageError, lambda: ask(vllm, folder), "serves 2 models", "--model", "'large', 'tiny'")
    assert ask(vllm, folder, model="large").server.model == "large"
    vllm.models = ()
    fails(UsageError, lambda: ask(vllm, folder), "serves 0 models")


def test_another_kind_of_server(vllm: FakeServer, folder: Path) -> None:
    vllm.before = lambda handler: answered(handler, 404, b"<html>not here</html>")
    fails(EngineError, lambda: ask(vllm, folder), "/v1/models", "404", "must be vLLM's OpenAI-compatible server or llama.cpp's")


def answered(handler: BaseHTTPRequestHandler, status: int, data: Any) -> bool:
    send(handler, status, data)
    return True


# What goes wrong on the way


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b'{"data": 3}', b'{"data": [{"name": 3}]}'])
def test_an_answer_that_is_none(vllm: FakeServer, folder: Path, data: bytes) -> None:
    vllm.before = lambda handler: answered(handler, 200, data)
    fails(EngineError, lambda: ask(vllm, folder), "/v1/models")


def test_500_is_not_asked_twice(server: FakeServer, folder: Path) -> None:
    engine = ask(server, folder)
    asked = len(server.requests)
    server.before = lambda handler: answered(handler, 500, {"error": {"message": "Out of range float values are not JSON compliant: nan"}})
    fails(EngineError, lambda: engine.score(SEQUENCES), "status 500", "Out of range float values")
    assert len(server.requests) == asked + 1


def test_503_is_asked_again_but_not_forever(server: FakeServer, folder: Path) -> None:
    engine = ask(server, folder)
    left = [2]

    def busy(handler: BaseHTTPRequestHandler) -> bool:
        left[0] -= 1
        return left[0] >= 0 and answered(handler, 503, {"error": "loading"})

    server.before = busy
    assert len(engine.score(SEQUENCES)) == len(SEQUENCES)
    asked = len(server.requests)
    server.before = lambda handler: answered(handler, 503, {"error": "loading"})
    fails(EngineError, lambda: engine.score(SEQUENCES), "status 503", "loading")
    assert len(server.requests) == asked + 3


def test_redirects_are_not_followed(vllm: FakeServer, folder: Path) -> None:
    def elsewhere(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(302)
        handler.send_header("Location", "http://127.0.0.1:1/")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    vllm.before = elsewhere
    fails(EngineError, lambda: ask(vllm, folder), "status 302")
    assert len(vllm.requests) == 1


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 20", b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"choices": []}'])
def test_a_connection_that_breaks(server: FakeServer, folder: Path, begun: bytes) -> None:
    engine = ask(server, folder)

    def broken(handler: BaseHTTPRequestHandler) -> bool:
        handler.close_connection = True
        handler.wfile.write(begun)
        return True

    asked = len(server.requests)
    server.before = broken
    fails(EngineError, lambda: engine.score(SEQUENCES), "the connection to", "broke")
    assert len(server.requests) == asked + 3
    server.before = lambda handler: False
    assert len(engine.score(SEQUENCES)) == len(SEQUENCES)


def test_a_connection_that_was_closed_while_idle(server: FakeServer, folder: Path) -> None:
    engine = ask(server, folder)

    def last(handler: BaseHTTPRequestHandler) -> bool:
        handler.close_connection = True
        return False

    server.before = last
    assert len(engine.score(SEQUENCES)) == len(SEQUENCES)
    assert len(engine.generate(PROMPTS, GREEDY)) == len(PROMPTS)


@pytest.mark.parametrize("trickles", [False, True])
def test_a_server_that_hangs(server: FakeServer, folder: Path, trickles: bool) -> None:
    """A byte every few milliseconds would start the timeout of a socket anew for ever."""
    engine = ask(server, folder, timeout_s=0.5)

    def hang(handler: BaseHTTPRequestHandler) -> bool:
        handler.close_connection = True
        end = time.monotonic() + 5
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                if trickles:
                    handler.wfile.write(b"H")
                time.sleep(0.02)
        return True

    server.before = hang
    started = time.monotonic()
    fails(EngineError, lambda: engine.score(SEQUENCES), "did not answer POST", "within 0.5 s")
    assert time.monotonic() - started < 3


# What goes wrong in the answer: each is one change of a right one


def scores_choice(change: Callable[[Answer], object]) -> Callable[[str, Answer], Answer]:
    """Changes the answer to the sequence that was sent first, which is the last one in the answer."""

    def apply(path: str, answer: Answer) -> Answer:
        if path == "/v1/completions":
            change(answer["choices"][-1])
        return answer

    return apply


def entry(choice: Answer) -> Answer:
    """Of the first scored token, 17."""
    found: Answer = choice["prompt_logprobs"][3]
    return found


WRONG_SCORES: dict[str, tuple[Callable[[Answer], object], str]] = {
    "no prompt_logprobs": (lambda choice: choice.pop("prompt_logprobs"), "gave no prompt_logprobs"),
    "too few": (lambda choice: choice["prompt_logprobs"].pop(), "log-probs of 5 tokens for 6"),
    "too many": (lambda choice: choice["prompt_logprobs"].append(None), "log-probs of 7 tokens for 6"),
    "another token": (lambda choice: entry(choice).pop("17"), "sequence 0, position 3: the server gave log-probs of other tokens than 17"),
    "none": (lambda choice: choice["prompt_logprobs"].__setitem__(3, None), "position 3: the server gave log-probs of other tokens"),
    "logits": (lambda choice: entry(choice)["17"].update(logprob=3.5), "3.5 as a log-prob", "--logprobs-mode"),  # type: ignore[dict-item]
    "other tokens read": (lambda choice: choice["prompt_token_ids"].insert(0, 1), "read other tokens than it was given"),
    "no token ids": (lambda choice: choice.update(prompt_token_ids=None), "does not return token ids"),
    "text": (lambda choice: entry(choice)["17"].update(logprob="high"), "logprob", "'high'"),  # type: ignore[dict-item]
    "no rank": (lambda choice: entry(choice)["17"].pop("rank"), "rank"),
    "same index": (lambda choice: choice.update(index=1), "answered 3 of 3 prompts"),
}


@pytest.mark.parametrize("name", WRONG_SCORES)
def test_wrong_scores_of_vllm(vllm: FakeServer, folder: Path, name: str) -> None:
    change, *fragments = WRONG_SCORES[name]
    engine = ask(vllm, folder)
    vllm.change = scores_choice(change)
    fails(EngineError, lambda: engine.score(SEQUENCES), *fragments)


def test_a_missing_choice(vllm: FakeServer, folder: Path) -> None:
    engine = ask(vllm, folder)
    vllm.change = lambda path, answer: {**answer, "choices": answer["choices"][:-1]}
    fails(EngineError, lambda: engine.score(SEQUENCES), "answered 2 of 3 prompts")


@pytest.mark.parametrize(
    ("value", "expected"), [(math.nan, math.nan), (None, math.nan), (-9999.0, -math.inf), (-math.inf, -math.inf), (1e-6, 1e-6)]
)
def test_a_log_prob_that_is_not_finite_stays_so(vllm: FakeServer, folder: Path, value: float | None, expected: float) -> None:
    engine = ask(vllm, folder)
    vllm.change = scores_choice(lambda choice: entry(choice)["17"].update(logprob=value))
    logps = engine.score(SEQUENCES)[0].logps
    np.testing.assert_array_equal(logps[0], np.float32(expected))
    assert np.isfinite(logps[1:]).all()


WRONG_GENERATIONS: dict[str, tuple[Callable[[Answer], object], str]] = {
    "no tokens": (lambda choice: choice.pop("token_ids"), "gave no token_ids"),
    "no log-probs": (lambda choice: choice.pop("logprobs"), "not one log-prob for each"),
    "one log-prob fewer": (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "not one log-prob for each"),
    "out of the vocabulary": (lambda choice: choice["token_ids"].__setitem__(0, 36), "outside [0, 36)"),
    "another end token": (lambda choice: choice.update(finish_reason="stop"), "none of the artifact's stop tokens [2]"),
    "a limit of its own": (
        lambda choice: (choice["token_ids"].pop(), choice["logprobs"]["token_logprobs"].pop()), "after 5 of 6 tokens, without a stop token",
    ),
    "too long": (lambda choice: (choice["token_ids"].append(3), choice["logprobs"]["token_logprobs"].append(-1.0)), "7 tokens for 1 to 6"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_GENERATIONS)
def test_wrong_generations_of_vllm(vllm: FakeServer, folder: Path, name: str) -> None:
    change, *fragments = WRONG_GENERATIONS[name]
    engine = ask(vllm, folder)
    made = engine.generate(PROMPTS[:1], GREEDY)[0]
    assert (len(made.tokens), made.finish_reason) == (6, "length")
    vllm.change = scores_choice(change)
    fails(EngineError, lambda: engine.generate(PROMPTS[:1], GREEDY), "prompt 0", *fragments)


WRONG_COMPLETIONS: dict[str, tuple[Callable[[Answer], object], str]] = {
    "another token": (lambda answer: answer.update(tokens=[5]), "generated [5] in place of token 17"),
    "no token": (lambda answer: answer.update(tokens=[]), "generated [] in place of token 17"),
    "the log-prob of another": (lambda answer: answer["completion_probabilities"][0].update(id=5), "log-prob of token 5 for token 17"),
    "no top token": (lambda answer: answer["completion_probabilities"][0].update(top_logprobs=[]), "or not the top one"),
    "another prompt": (lambda answer: answer.update(tokens_evaluated=4), "read 4 tokens of 3"),
    "a cut prompt": (lambda answer: answer.update(truncated=True), "read 3 tokens of 3"),
    "logits": (lambda answer: answer["completion_probabilities"][0].update(logprob=2.0), "2 as a log-prob"),
    "text": (lambda answer: answer.update(tokens="17"), "tokens"),
}


@pytest.mark.parametrize("name", WRONG_COMPLETIONS)
def test_wrong_scores_of_llamacpp(llamacpp: FakeServer, folder: Path, name: str) -> None:
    change, *fragments = WRONG_COMPLETIONS[name]
    engine = ask(llamacpp, folder)
    llamacpp.change = lambda path, answer: (change(answer), answer)[1] if path == "/completion" else answer
    fails(EngineError, lambda: engine.score(SEQUENCES), *fragments)


def test_a_token_within_a_character_has_no_log_prob(llamacpp: FakeServer, folder: Path) -> None:
    engine = ask(llamacpp, folder)
    llamacpp.change = lambda path, answer: {**answer, "completion_probabilities": []} if answer.get("tokens") == [17] else answer
    logps = engine.score(SEQUENCES)[0].logps
    assert math.isnan(logps[0])
    assert np.isfinite(logps[1:]).all()


def test_llamacpp_ends_at_a_token_that_is_no_stop_token(llamacpp: FakeServer, folder: Path) -> None:
    engine = ask(llamacpp, folder)
    llamacpp.change = lambda path, answer: {**answer, "stop_type": "eos"}
    fails(EngineError, lambda: engine.generate(PROMPTS[:1], GREEDY), "none of the artifact's stop tokens [2]")


def test_llamacpp_is_cut_at_a_stop_token_that_it_does_not_know(llamacpp: FakeServer, folder: Path) -> None:
    engine, behind = ask(llamacpp, folder), FakeEngine(folder, {}, VERSION)
    token = int(behind.generate(PROMPTS[:1], GREEDY)[0].tokens[2])
    stopping = Sampling(6, 0.0, stop_token_ids=(token,))
    got, expected = engine.generate(PROMPTS[:1], stopping)[0], behind.generate(PROMPTS[:1], stopping)[0]
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.logps, expected.logps)
    assert got.finish_reason == "stop"
