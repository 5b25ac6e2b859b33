"""Requests and answers of an engine as JSON, for engines in other processes and on other machines.

Arrays travel as base64 of their little-endian bytes, so that log-probs arrive bit for bit.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy_targets import errors
from deploy_targets.errors import DeployTargetsError, EngineError, ListedError
from deploy_targets.protocols import Engine
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence


def generate_request(prompts: Sequence[Sequence[int]], sampling: Sampling) -> dict[str, Any]:
    """The arguments of `Engine.generate`."""
    return {"prompts": [[int(token) for token in prompt] for prompt in prompts], "sampling": asdict(sampling)}


def score_request(sequences: Sequence[TokenSequence], temperature: float) -> dict[str, Any]:
    """The arguments of `Engine.score`."""
    given = [([int(token) for token in sequence.tokens], sequence.prompt_len) for sequence in sequences]
    return {"sequences": given, "temperature": temperature}


def answer_generate(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    """What `engine` answers to a `generate_request`. Raises `TypeError`, `ValueError` or `KeyError` for a request that is none."""
    sampling = {**request["sampling"], "stop_token_ids": tuple(request["sampling"]["stop_token_ids"])}
    return pack_generations(engine.generate(request["prompts"], Sampling(**sampling)))


def answer_score(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    """What `engine` answers to a `score_request`. Raises as `answer_generate` does."""
    sequences = [TokenSequence(tuple(tokens), prompt_len) for tokens, prompt_len in request["sequences"]]
    return pack_scores(engine.score(sequences, request["temperature"]))


def pack_error(error: Exception) -> dict[str, Any]:
    """An error by the name of its class."""
    return {"class": type(error).__name__, "message": str(error), "offenders": getattr(error, "offenders", ())}


def unpack_error(packed: Mapping[str, Any]) -> DeployTargetsError | None:
    """The error as one of our tree; None for a class that is not of it."""
    error_class = getattr(errors, str(packed["class"]), None)
    if not (isinstance(error_class, type) and issubclass(error_class, DeployTargetsError)):
        return None
    # Constructors build messages from their arguments; this message is already built.
    error = error_class.__new__(error_class)
    error.args = (packed["message"],)
    if isinstance(error, ListedError):
        error.offenders = tuple(packed["offenders"])
    return error


def encoded(array: NDArray[Any]) -> str:
    """The bytes of an array as base64."""
    return base64.b64encode(array.tobytes()).decode("ascii")


def decoded(text: str, dtype: str, lengths: Sequence[int]) -> list[NDArray[Any]]:
    """Arrays of these lengths, which were encoded as one, flat. Raises `ValueError` where they do not add up to it."""
    flat = np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
    if sum(lengths) != len(flat):
        raise ValueError(f"{len(flat)} values for lengths that sum to {sum(lengths)}")
    return np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []


def _check_lengths(pairs: Sequence[tuple[int, int]], what: str) -> None:
    """Both travel as one array each, with one list of lengths: what does not fit would shift all that follows."""
    for index, (first, second) in enumerate(pairs):
        if first != second:
            raise EngineError(f"answer {index} of the engine has {first} and {second} {what}")


def pack_generations(generations: Sequence[Generation]) -> dict[str, Any]:
    """Answers of `Engine.generate`, in order. Raises `EngineError` for one whose tokens and log-probs differ in number."""
    _check_lengths([(len(generation.tokens), len(generation.logps)) for generation in generations], "tokens and log-probs")
    return {
        "lengths": [len(generation.tokens) for generation in generations],
        "tokens": encoded(np.concatenate([np.zeros(0, np.int32), *(generation.tokens for generation in generations)]).astype("<i4")),
        "logps": encoded(np.concatenate([np.zeros(0, np.float32), *(generation.logps for generation in generations)]).astype("<f4")),
        "about": [[g.weight_version, g.temperature, g.finish_reason] for g in generations],
        "routes": _pack_routes([generation.routes for generation in generations]),
    }


def _pack_routes(routes: Sequence[NDArray[np.int16] | None]) -> dict[str, Any] | None:
    """All of them as one array; None where a response has none."""
    given = [array for array in routes if array is not None]
    if not given or len(given) < len(routes):
        return None
    return {"per_token": given[0].shape[1:], "experts": encoded(np.concatenate(given).astype("<i2"))}


def _unpack_routes(packed: Mapping[str, Any] | None, num_inputs: Sequence[int]) -> Sequence[NDArray[np.int16] | None]:
    if packed is None:
        return [None] * len(num_inputs)
    num_layers, top_k = packed["per_token"]
    flat = decoded(packed["experts"], "<i2", [num * num_layers * top_k for num in num_inputs])
    return [experts.reshape(-1, num_layers, top_k) for experts in flat]


def unpack_generations(packed: Mapping[str, Any], prompts: Sequence[Sequence[int]]) -> list[Generation]:
    """What `pack_generations` was given, for these prompts. Raises `EngineError` where there are more or fewer than those."""
    if len(packed["lengths"]) != len(prompts):
        raise EngineError(f"the engine gave {len(packed['lengths'])} answers to {len(prompts)} requests")
    tokens = decoded(packed["tokens"], "<i4", packed["lengths"])
    logps = decoded(packed["logps"], "<f4", packed["lengths"])
    routes = _unpack_routes(packed["routes"], [len(prompt) + num - 1 for prompt, num in zip(prompts, packed["lengths"], strict=True)])
    return [
        Generation(tuple(map(int, prompt)), token_ids, token_logps, weight_version, temperature, finish_reason, experts)
        for prompt, token_ids, token_logps, (weight_version, temperature, finish_reason), experts in zip(
            prompts, tokens, logps, packed["about"], routes, strict=True
        )
    ]


def pack_scores(scores: Sequence[TokenScores]) -> dict[str, Any]:
    """Answers of `Engine.score`, in order. Raises `EngineError` for one whose log-probs and greedy tokens differ in number."""
    _check_lengths([(len(score.logps), len(score.greedy_tokens)) for score in scores], "log-probs and greedy tokens")
    return {
        "lengths": [len(score.logps) for score in scores],
        "logps": encoded(np.concatenate([np.zeros(0, np.float32), *(score.logps for score in scores)]).astype("<f4")),
        "greedy_tokens": encoded(np.concatenate([np.zeros(0, np.int32), *(score.greedy_tokens for score in scores)]).astype("<i4")),
        "about": [[score.weight_version, score.temperature] for score in scores],
    }


def unpack_scores(packed: Mapping[str, Any]) -> list[TokenScores]:
    """What `pack_scores` was given."""
    logps = decoded(packed["logps"], "<f4", packed["lengths"])
    greedy_tokens = decoded(packed["greedy_tokens"], "<i4", packed["lengths"])
    return [
        TokenScores(token_logps, greedy, weight_version, temperature)
        for token_logps, greedy, (weight_version, temperature) in zip(logps, greedy_tokens, packed["about"], strict=True)
    ]
