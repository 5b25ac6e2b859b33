"""Tokens drawn and scored from logits in numpy, for the engines whose runtime hands over logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK, _MANY = 256, 1024
"""Of vocabularies with more than `_MANY` tokens, blocks are summed as one, and only the one that is drawn from token by token:
a cumulative sum over a whole large vocabulary takes longer than all else about a draw."""


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
        weights = np.exp(logits)
        if logits.shape[1] <= _MANY:
            ends = np.cumsum(weights, axis=1, dtype=np.float64)
        else:
            ends = np.cumsum(np.add.reduceat(weights, np.arange(0, logits.shape[1], _BLOCK), axis=1, dtype=np.float64), axis=1)
        totals = ends[:, -1].copy()
        if temperature == 0:
            tokens = logits.argmax(axis=1)
        else:
            tokens = _passed(ends, uniforms * totals)
            if logits.shape[1] > _MANY:
                tokens = _within(weights, tokens, uniforms * totals - np.where(tokens > 0, ends[rows, tokens - 1], 0.0))
        return tokens, (logits[rows, tokens] - np.log(totals)).astype(np.float32)


def _passed(ends: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Where each row of the cumulative sums `ends` passes its point; points at or beyond the last sum count as just below it."""
    below_total = np.minimum(points, np.nextafter(ends[:, -1], 0.0))
    return np.asarray((ends > below_total[:, None]).argmax(axis=1))


def _within(weights: NDArray[np.float32], blocks: NDArray[np.int64], points: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column within the block of each row where the sum from the block's beginning passes the point."""
    num_columns = weights.shape[1]
    columns = blocks[:, None] * _BLOCK + np.arange(_BLOCK)
    inside = np.where(columns < num_columns, weights[np.arange(len(weights))[:, None], np.minimum(columns, num_columns - 1)], 0.0)
    return blocks * _BLOCK + _passed(np.cumsum(inside, axis=1, dtype=np.float64), points)


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
