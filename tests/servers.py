"""Servers that answer as vLLM's and llama.cpp's do, with the fake engine behind them, and wrongly where a test says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from deploy_targets.engines.fake import FakeEngine
from deploy_targets.types import Sampling, TokenSequence

Answer = dict[str, Any]
Handle = Callable[[BaseHTTPRequestHandler], bool]


@dataclass
class FakeServer:
    """What is behind the address. A test changes `change`, `before` or `key` while it runs."""

    engine: FakeEngine
    software: Literal["vllm", "llamacpp"]
    url: str = ""
    change: Callable[[str, Answer], Any] = lambda path, answer: answer
    """(path, right answer) -> what is answered."""
    before: Handle = lambda handler: False
    """Called with each request; True where it has answered by itself."""
    key: str | None = None
    models: tuple[str, ...] = ("tiny",)
    max_model_len: int = 512
    requests: list[tuple[str, Any]] = field(default_factory=list)
    """(path, body) of every request."""

    def answer(self, path: str, body: Any) -> Answer | None:
        """The right answer; None where there is no such path."""
        if path == "/v1/models":
            limit = {"max_model_len": self.max_model_len} if self.software == "vllm" else {}
            return {"object": "list", "data": [{"id": name, "owned_by": self.software, **limit} for name in self.models]}
        if self.software == "vllm":
            return {"/version": lambda: {"version": "0.32.0"}, "/v1/completions": lambda: self._vllm(body)}.get(path, lambda: None)()
        props = {"build_info": "b7000-abc", "default_generation_settings": {"n_ctx": self.max_model_len}}
        return {"/props": lambda: props, "/completion": lambda: self._llamacpp(body)}.get(path, lambda: None)()

    def _vllm(self, body: Any) -> Answer:
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            choice: Answer = {"index": index, "text": "", "prompt_token_ids": prompt, "finish_reason": "length"}
            if "prompt_logprobs" in body:
                choice |= {"token_ids": [3], "prompt_logprobs": [None, *self._positions(prompt, body["prompt_logprobs"])]}
            else:
                sampling = Sampling(body["max_tokens"], 0.0, stop_token_ids=tuple(body["stop_token_ids"]))
                made = self.engine.generate([prompt], sampling)[0]
                logprobs = {"tokens": [f"token_id:{t}" for t in made.tokens], "token_logprobs": made.logps.tolist()}
                choice |= {"token_ids": made.tokens.tolist(), "logprobs": logprobs, "finish_reason": made.finish_reason}
            choices.append(choice)
        return {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    def _positions(self, tokens: list[int], num_top: int) -> list[Answer]:
        entries = []
        for end in range(1, len(tokens)):
            given = range(self.engine._vocab_size) if num_top > 1 else [tokens[end]]
            logps = {token: self._logp(tokens[:end], token) for token in {*given, self._greedy(tokens[:end])}}
            ranked = sorted(logps, key=lambda token: -logps[token])
            entries.append(
                {str(token): {"logprob": logps[token], "rank": ranked.index(token) + 1, "decoded_token": "?"} for token in logps}
            )
        return entries

    def _logp(self, before: list[int], token: int) -> float:
        return float(self.engine.score([TokenSequence((*before, token), len(before))])[0].logps[0])

    def _greedy(self, before: list[int]) -> int:
        return int(self.engine.score([TokenSequence((*before, 0), len(before))])[0].greedy_tokens[0])

    def _llamacpp(self, body: Any) -> Answer:
        prompt, biased = body["prompt"], dict(body.get("logit_bias", []))
        tokens: list[int] = []
        probabilities: list[Answer] = []
        while len(tokens) < body["n_predict"] and (not tokens or tokens[-1] != 2):
            greedy = self._greedy([*prompt, *tokens])
            token = next(iter(biased), greedy)
            top = [{"id": greedy, "logprob": self._logp([*prompt, *tokens], greedy)}]
            probabilities.append({"id": token, "logprob": self._logp([*prompt, *tokens], token), "top_logprobs": top})
            tokens.append(token)
        stop = "eos" if tokens[-1] == 2 else "limit"
        return {
            "content": "",
            "tokens": tokens,
            "tokens_evaluated": len(prompt),
            "stop_type": stop,
            "completion_probabilities": probabilities,
        }


@contextmanager
def fake_server(artifact: Path, software: Literal["vllm", "llamacpp"], weight_version: int) -> Iterator[FakeServer]:
    """One that serves the weights of `artifact` on a free port of the loopback."""
    behind = FakeServer(FakeEngine(artifact, {}, weight_version), software)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _do(self, body: Any) -> None:
            behind.requests.append((self.path, body))
            if behind.before(self):
                return
            if behind.key is not None and self.headers["Authorization"] != f"Bearer {behind.key}":
                send(self, 401, {"error": "Unauthorized"})
                return
            answer = behind.answer(self.path, body)
            if answer is None:
                send(self, 404, {"detail": "Not Found"})
            else:
                send(self, 200, behind.change(self.path, answer))

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    behind.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield behind
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, answer: Any) -> None:
    """Answer with JSON, or with the bytes as they are."""
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
