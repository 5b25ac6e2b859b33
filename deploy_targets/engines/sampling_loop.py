"""Sampling for the engines whose runtime hands over logits: prompts are cut into batches, whose sequences advance together.

A finished sequence gives up its slot, and the last live ones move to where others have finished: slots stay dense, and a step costs
what the live ones cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploy_targets.engines.draws import Draws, pick_tokens
from deploy_targets.types import Generation, Sampling

Prompt = tuple[int, ...]


class Slots(Protocol):
    """A key-value cache that holds a sequence in each of its slots."""

    def fill(self, prompts: Sequence[Prompt]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read the prompts; returns which of them each slot serves, int64 [num_prompts], and the logits [num_prompts, vocab] of each slot.

        Equal neighbours may share their prefill. The logits may be overwritten.
        """
        ...

    def keep(self, num_live: int, holes: NDArray[np.int64], movers: NDArray[np.int64]) -> None:
        """Move the slots `movers` to the slots `holes`; those from `num_live` on are then free."""
        ...

    def step(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append `tokens` [num_live] to sequences of `lengths` [num_live]; returns logits [num_live, vocab], free to be overwritten."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that are answered together.

    `places`: int64 [n], theirs in the request. `uniforms`: float64 [n, max_tokens], what decides the draws.
    """

    places: NDArray[np.int64]
    prompts: list[Prompt]
    uniforms: NDArray[np.float64]


def batches(prompts: Sequence[Prompt], sampling: Sampling, max_batch_size: int, num_parallel: int) -> list[Batch]:
    """Cut a request into batches of at most `max_batch_size`, their number a multiple of `num_parallel` where it can be.

    Request i draws from the i-th stretch of one generator seeded by `sampling.seed`. Sorted by length, so that a batch advances
    together; the sort is stable and keeps equal neighbours together.
    """
    uniforms = np.random.default_rng(sampling.seed).random((len(prompts), sampling.max_tokens))
    order = np.array(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), np.int64)
    num_batches = -(-len(prompts) // (max_batch_size * num_parallel)) * num_parallel
    parts = [part for part in np.array_split(order, max(1, num_batches)) if len(part)]
    return [Batch(part, [prompts[i] for i in part], uniforms[part]) for part in parts]


def generations(parts: Sequence[Batch], draws: Sequence[Draws], sampling: Sampling, weight_version: int) -> list[Generation]:
    """What was drawn for each batch, as answers in the order of the request."""
    found: dict[int, Generation] = {}
    for batch, drawn in zip(parts, draws, strict=True):
        for row, (place, prompt) in enumerate(zip(batch.places.tolist(), batch.prompts, strict=True)):
            count = drawn.counts[row]
            tokens, logps = drawn.tokens[row, :count].copy(), drawn.logps[row, :count].copy()
            stopped = int(tokens[-1]) in sampling.stop_token_ids
            found[place] = Generation(prompt, tokens, logps, weight_version, sampling.temperature, "stop" if stopped else "length")
    return [found[place] for place in range(len(found))]


def sample_batch(slots: Slots, batch: Batch, sampling: Sampling, max_model_len: int) -> Draws:
    """Sample one response per prompt; no sequence grows beyond `max_model_len` tokens."""
    lengths = np.array([len(prompt) for prompt in batch.prompts])
    budgets = np.minimum(sampling.max_tokens, max_model_len - lengths)
    draws = Draws(
        np.zeros((len(lengths), sampling.max_tokens), np.int32),
        np.zeros((len(lengths), sampling.max_tokens), np.float32),
        np.zeros(len(lengths), np.int64),
    )
    rows, logits = slots.fill(batch.prompts)
    lengths = lengths[rows]
    stops = np.array(sampling.stop_token_ids, np.int64)
    for count in range(1, sampling.max_tokens + 1):
        tokens, logps = pick_tokens(logits, sampling.temperature, batch.uniforms[rows, count - 1])
        draws.tokens[rows, count - 1] = tokens
        draws.logps[rows, count - 1] = logps
        finished = np.isin(tokens, stops) | (budgets[rows] <= count)
        if finished.any():
            draws.counts[rows[finished]] = count
            num_live = int((~finished).sum())
            if num_live == 0:
                break
            holes = np.flatnonzero(finished[:num_live])
            movers = num_live + np.flatnonzero(~finished[num_live:])
            slots.keep(num_live, holes, movers)
            for column in (rows, lengths, tokens):
                column[holes] = column[movers]
            rows, lengths, tokens = rows[:num_live], lengths[:num_live], tokens[:num_live]
        logits = slots.step(tokens, lengths)
        lengths = lengths + 1
    return draws
