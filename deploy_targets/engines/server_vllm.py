"""vLLM's OpenAI-compatible server: `/v1/completions` with token ids, and vLLM's own fields beside OpenAI's. Written against 0.32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from deploy_targets.engines.http_json import JsonServer, NotFoundError
from deploy_targets.engines.server_answers import finished, logp_of, parsed
from deploy_targets.engines.vllm_options import VllmOptions, temperature_problem
from deploy_targets.errors import EngineError, UsageError
from deploy_targets.types import Generation, Sampling, Server, TokenScores, TokenSequence

_PATH = "/v1/completions"
_PROMPTS_PER_REQUEST = 128
_NEUTRAL: Mapping[str, Any] = {
    # Else the server takes them from the model's generation_config.json.
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "return_token_ids": True,
}  # fmt: skip


class _Version(BaseModel):
    version: str


class _Logprob(BaseModel):
    logprob: float | None
    rank: int


class _Logprobs(BaseModel):
    token_logprobs: list[float | None]


class _Choice(BaseModel):
    index: int
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, _Logprob] | None] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice]


class VllmServer:
    """Asks for one of the server's models."""

    def __init__(self, http: JsonServer, model: str, max_model_len: int | None, vocab_size: int, weight_version: int) -> None:
        """Ask for the server's version. `max_model_len` is what it says of the model."""
        self._http, self._model, self._vocab_size = http, model, vocab_size
        self.weight_version = weight_version
        self.server = Server(http.url, model, "vllm", _version(http), max_model_len, http.is_local)
        # vLLM generates a token also when it only scores.
        self.max_scored_len = None if max_model_len is None else max_model_len - 1

    def score(self, sequences: Sequence[TokenSequence], temperature: float) -> list[TokenScores]:
        """By `prompt_logprobs`. Another temperature than 1 needs those of the whole vocabulary, which the server must allow."""
        problem = temperature_problem(VllmOptions(), temperature, self._vocab_size)
        if problem is not None:
            raise UsageError(problem)
        scores: list[TokenScores] = []
        size = _PROMPTS_PER_REQUEST if temperature == 1 else 1
        for begin in range(0, len(sequences), size):
            some = sequences[begin : begin + size]
            extra = {"max_tokens": 1, "prompt_logprobs": 1 if temperature == 1 else self._vocab_size}
            choices = self._complete([sequence.tokens for sequence in some], extra)
            for offset, (sequence, choice) in enumerate(zip(some, choices, strict=True)):
                scores.append(self._scores(sequence, choice, temperature, f"sequence {begin + offset}"))
        return scores

    def _scores(self, sequence: TokenSequence, choice: _Choice, temperature: float, where: str) -> TokenScores:
        entries = choice.prompt_logprobs
        if entries is None:
            raise EngineError(
                f"the server at {self._http.url} gave no prompt_logprobs, so the gap on the probes cannot be measured. "
                "It must be vLLM's own server, or llama.cpp's"
            )
        if len(entries) != len(sequence.tokens):
            raise EngineError(f"{where}: the server gave log-probs of {len(entries)} tokens for {len(sequence.tokens)}")
        logps, greedy = [], []
        for position in range(sequence.prompt_len, len(sequence.tokens)):
            entry, token = entries[position], sequence.tokens[position]
            if entry is None or token not in entry:
                raise EngineError(f"{where}, position {position}: the server gave log-probs of other tokens than {token}")
            here = {other: logp_of(one.logprob, f"{where}, position {position}") for other, one in entry.items()}
            if temperature != 1 and len(here) != self._vocab_size:
                raise EngineError(f"{where}, position {position}: the server gave {len(here)} of {self._vocab_size} log-probs")
            logps.append(here[token] if temperature == 1 else _tempered(here, token, temperature))
            greedy.append(min(entry, key=lambda other: entry[other].rank))
        return TokenScores(np.array(logps, np.float32), np.array(greedy, np.int32), self.weight_version, temperature)

    def generate(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], stop_token_ids: Sequence[int]) -> list[Generation]:
        """Greedy responses; prompts of equal limits share requests."""
        made: dict[int, Generation] = {}
        for limit in sorted(set(limits)):
            indices = [index for index in range(len(prompts)) if limits[index] == limit]
            extra = {"max_tokens": limit, "logprobs": 0, "stop_token_ids": list(stop_token_ids), "return_tokens_as_token_ids": True}
            for begin in range(0, len(indices), _PROMPTS_PER_REQUEST):
                some = indices[begin : begin + _PROMPTS_PER_REQUEST]
                choices = self._complete([prompts[index] for index in some], extra)
                for index, choice in zip(some, choices, strict=True):
                    made[index] = self._generation(prompts[index], choice, limit, stop_token_ids, f"prompt {index}")
        return [made[index] for index in range(len(prompts))]

    def sample(self, http: JsonServer, prompt: Sequence[int], count: int, limit: int, sampling: Sampling, seed: int) -> list[Generation]:
        """`count` draws of one prompt at a positive temperature, which follow from `seed`; asked over `http`."""
        stop = sampling.stop_token_ids
        extra = {
            "n": count, "max_tokens": limit, "temperature": sampling.temperature, "seed": seed,
            "logprobs": 0, "stop_token_ids": list(stop), "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choices = self._complete([prompt], extra, http)
        return [self._generation(prompt, choice, limit, stop, f"prompt {list(prompt[:8])}", sampling.temperature) for choice in choices]

    def _generation(
        self, prompt: Sequence[int], choice: _Choice, limit: int, stop: Sequence[int], where: str, temperature: float = 0.0
    ) -> Generation:
        tokens = choice.token_ids
        if tokens is None or choice.logprobs is None or len(choice.logprobs.token_logprobs) != len(tokens):
            raise EngineError(f"{where}: the server gave no token_ids, or not one log-prob for each. It must be vLLM's own server")
        finished(tokens, limit, stop, self._vocab_size, choice.finish_reason == "stop", where)
        return Generation(
            prompt=tuple(prompt),
            tokens=np.array(tokens, np.int32),
            logps=np.array([logp_of(value, where) for value in choice.logprobs.token_logprobs], np.float32),
            weight_version=self.weight_version,
            temperature=temperature,
            finish_reason="stop" if choice.finish_reason == "stop" else "length",
        )

    def _complete(self, prompts: Sequence[Sequence[int]], extra: Mapping[str, Any], http: JsonServer | None = None) -> list[_Choice]:
        """One choice for each prompt, or `n` of them, in their order; each for the very tokens that were sent."""
        body = {"model": self._model, "prompt": [list(prompt) for prompt in prompts], **_NEUTRAL, **extra}
        prompts = [prompt for prompt in prompts for _ in range(extra.get("n", 1))]
        answer = (http or self._http).post(_PATH, body)
        choices = sorted(parsed(_Completion, answer, self._http.url, f"POST {_PATH}").choices, key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(len(prompts))):
            raise EngineError(f"the server at {self._http.url} answered {len(choices)} of {len(prompts)} prompts")
        for prompt, choice in zip(prompts, choices, strict=True):
            if choice.prompt_token_ids is None:
                raise EngineError(
                    f"the server at {self._http.url} does not return token ids (return_token_ids). It must be vLLM's, 0.20 or later"
                )
            if choice.prompt_token_ids != list(prompt):
                raise EngineError(f"the server at {self._http.url} read other tokens than it was given: {choice.prompt_token_ids[:8]}...")
        return choices


def _version(http: JsonServer) -> str:
    try:
        return parsed(_Version, http.get("/version"), http.url, "GET /version").version
    except NotFoundError:
        return "unknown"


def _tempered(logps: Mapping[int, float], token: int, temperature: float) -> float:
    """The log-prob of `token` at `temperature`, from those of the whole vocabulary at temperature 1; NaN where one is."""
    scaled = np.array(list(logps.values())) / temperature
    top = scaled.max()
    if not math.isfinite(top):
        return math.nan
    return float(logps[token] / temperature - top - np.log(np.exp(scaled - top).sum()))
