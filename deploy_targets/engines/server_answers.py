"""What every answer of a server is held against before a number of it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deploy_targets.errors import EngineError
from deploy_targets.profile import validation_lines

AnswerT = TypeVar("AnswerT", bound=BaseModel)
_ROUNDING_NATS = 1e-4
_CLAMPED_NATS = -9999.0
"""What vLLM sends for minus infinity, which JSON has no word for; llama.cpp sends the lowest float."""
_TEXT_CHARS = 300


def parsed(answer_class: type[AnswerT], answer: Any, url: str, what: str) -> AnswerT:
    """`answer` as `answer_class`. Raises `EngineError` that names the fields which are not as they should be."""
    try:
        return answer_class.model_validate(answer)
    except ValidationError as error:
        lines = "; ".join(validation_lines(error)[:3])[:_TEXT_CHARS]
        raise EngineError(f"the server at {url} answered {what} with something else than expected: {lines}") from None


def logp_of(value: float | None, where: str) -> float:
    """One log-prob of an answer: NaN where there is none, minus infinity where it was clamped. Raises `EngineError` for a logit."""
    if value is None or math.isnan(value):
        return math.nan
    if value > _ROUNDING_NATS:
        raise EngineError(
            f"{where}: the server gave {value:.4g} as a log-prob, which none can be; it gives logits. "
            "Start vLLM without --logprobs-mode, or with raw_logprobs or processed_logprobs"
        )
    return -math.inf if value <= _CLAMPED_NATS else value


def finished(tokens: Sequence[int], limit: int, stop_token_ids: Sequence[int], vocab_size: int, stopped: bool, where: str) -> None:
    """Raise `EngineError` unless `tokens` are a whole response: all in the vocabulary, and ended by a stop token or by `limit`."""
    if not tokens or len(tokens) > limit or min(tokens) < 0 or max(tokens) >= vocab_size:
        raise EngineError(f"{where}: the server gave {len(tokens)} tokens for 1 to {limit}, or ids outside [0, {vocab_size})")
    if stopped and tokens[-1] not in stop_token_ids:
        raise EngineError(
            f"{where}: the server ended the response at token {tokens[-1]}, which is none of the artifact's stop tokens "
            f"{sorted(stop_token_ids)}: its end-of-sequence ids are not those of the training"
        )
    if not stopped and len(tokens) < limit:
        raise EngineError(
            f"{where}: the server ended the response after {len(tokens)} of {limit} tokens, without a stop token. It has a limit of its own"
        )
