"""A server that already runs, asked over HTTP: vLLM's OpenAI-compatible one, or llama.cpp's.

It is measured, not managed: nothing is started, updated or ended. Token ids go in and come out, so its tokenizer and chat template are
not in question, and every setting of sampling is in the request, so its defaults are not either.

The log-probs are those at temperature 1. vLLM's `prompt_logprobs` are so in both modes of `--logprobs-mode` that give log-probs, raw and
processed, since the prompt passes no sampler; those of greedily generated tokens are, too. In the modes that give logits they are not
normalised, which is refused where it shows: a log-prob above zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from deploy_targets.engines.http_json import JsonServer, NotFoundError
from deploy_targets.engines.requests import check_sequences, read_limits, response_limits
from deploy_targets.engines.server_answers import parsed
from deploy_targets.engines.server_llamacpp import LlamaCppServer
from deploy_targets.engines.server_vllm import VllmServer
from deploy_targets.errors import EngineError, UsageError
from deploy_targets.types import Generation, Sampling, Server, TokenScores, TokenSequence, WeightFile

DEFAULT_TIMEOUT_S = 900.0
"""For each request."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    owned_by: str = ""
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


class _Api(Protocol):
    """What is asked of either server, in its own words."""

    server: Server
    """What it says of itself."""
    max_scored_len: int | None
    """Longest prompt + response that `score` can be given; None where the server does not say it."""

    def score(self, sequences: Sequence[TokenSequence], temperature: float) -> list[TokenScores]: ...

    def generate(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], stop_token_ids: Sequence[int]) -> list[Generation]: ...


class ServerEngine:
    """An engine that is someone else's process, maybe on another machine."""

    def __init__(
        self,
        url: str,
        artifact_dir: Path,
        weight_version: int,
        *,
        max_model_len: int,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Ask the server what it serves. `weight_version` and `max_model_len` are what the artifact says of itself.

        Raises `UsageError` for an address that is none, a key that is refused, or a `model` it does not serve (without one: where it
        serves several), and `EngineError` where no server answers.
        """
        self.weight_version = weight_version
        self._http = JsonServer(url, api_key, timeout_s)
        model_len, self._vocab_size = read_limits(artifact_dir, max_model_len)
        try:
            served = self._find(model)
            self._api: _Api
            if served.owned_by == "llamacpp":
                self._api = LlamaCppServer(self._http, served.id, self._vocab_size, weight_version)
            else:
                self._api = VllmServer(self._http, served.id, served.max_model_len, self._vocab_size, weight_version)
        except BaseException:
            self._http.close()
            raise
        self.server = self._api.server
        self._max_model_len = min(model_len, self.server.max_model_len or model_len)
        self._max_scored_len = min(model_len, self._api.max_scored_len or model_len)

    def _find(self, model: str | None) -> _Model:
        try:
            answer = self._http.get("/v1/models")
        except NotFoundError as error:
            raise EngineError(f"{error}. It must be vLLM's OpenAI-compatible server or llama.cpp's llama-server") from None
        models = {served.id: served for served in parsed(_Models, answer, self._http.url, "GET /v1/models").data}
        names = ", ".join(map(repr, sorted(models))) or "none"
        if model is None and len(models) != 1:
            raise UsageError(f"the server at {self._http.url} serves {len(models)} models; choose one with --model: {names}")
        if model is not None and model not in models:
            raise UsageError(f"the server at {self._http.url} does not serve the model {model!r}; it serves: {names}")
        return models[model] if model is not None else next(iter(models.values()))

    def update(self, weights: WeightFile) -> int:
        """Refused: raises `UsageError`."""
        raise UsageError(f"a running server is measured, not changed: {weights.path} cannot be loaded into {self._http.url}")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Greedy responses. Raises `UsageError` for a positive temperature: a server gives no log-probs of what it draws from."""
        if sampling.temperature > 0:
            raise UsageError(f"a running server is asked for greedy responses only, not at temperature {sampling.temperature}")
        limits = response_limits(prompts, sampling.max_tokens, self._max_model_len, self._vocab_size)
        return self._api.generate(prompts, limits, sampling.stop_token_ids)

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Teacher-forced log-probs; a sequence longer than the server takes is a `UsageError`."""
        check_sequences(sequences, temperature, self._max_scored_len, self._vocab_size)
        return self._api.score(sequences, temperature)

    def close(self) -> None:
        """Close the connection; the server goes on."""
        self._http.close()
