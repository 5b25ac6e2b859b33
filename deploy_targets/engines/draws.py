"""Tokens drawn and scored from logits in numpy, for the engines whose runtime hands over logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Draws:
    """The responses of a batch, of which row i holds `counts[i]` tokens.

    `tokens`: int32 [num_rows, max_tokens]. `logps`: float32 [num_rows, max_tokens], nats. `counts`: int64 [num_rows].
    """

    tokens: NDArray[np.int32]
    logps: NDArray[np.float32]
    counts: NDArray[np.int64]


def pick_tokens(
    logits: NDArray[np.float32], temperature: float, uniforms: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """One token per row by the inverse of the cumulative distribution, and its log-prob (nats).

    `logits` [n, vocab] is overwritten; `uniforms` [n] lie in [0, 1). Temperature 0 takes the most probable token and
    gives its log-prob at temperature 1. A row with a non-finite logit gets a NaN log-prob.
    """
    rows = np.arange(len(logits))
    with np.errstate(invalid="ignore"):
        logits -= logits.max(axis=1, keepdims=True)
        if temperature not in (0, 1):
            logits /= temperature
        cumulative = np.cumsum(np.exp(logits), axis=1, dtype=np.float64)
        totals = cumulative[:, -1].copy()
        if temperature == 0:
            tokens = logits.argmax(axis=1)
        else:
            cumulative[:, -1] = np.inf  # uniform * total may round up to the total
            tokens = (cumulative > (uniforms * totals)[:, None]).argmax(axis=1)
        return tokens, (logits[rows, tokens] - np.log(totals)).astype(np.float32)


def score_tokens(logits: NDArray[np.float32], tokens: Sequence[int], temperature: float) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Log-prob (nats) of each given token after `temperature`, and the most probable token: float32 and int32 [n].

    `logits` is [n, vocab]. A row with a non-finite logit gets a NaN log-prob.
    """
    greedy = logits.argmax(axis=1).astype(np.int32)
    with np.errstate(invalid="ignore"):
        scaled = (logits - logits.max(axis=1, keepdims=True)) / np.float32(temperature)
        totals = np.exp(scaled).sum(axis=1, dtype=np.float64)
        logps = scaled[np.arange(len(tokens)), np.asarray(tokens)] - np.log(totals)
    return logps.astype(np.float32), greedy
