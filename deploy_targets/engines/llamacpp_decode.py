"""Batches of sequences through one llama.cpp context: teacher-forced logits, and a sampling loop over slots that stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from deploy_targets.engines.draws import Draws, pick_tokens
from deploy_targets.engines.llamacpp_context import Context, passes
from deploy_targets.types import Sampling


def logits_of(
    context: Context, sequences: Sequence[Sequence[int]], starts: Sequence[int], first_slot: int = 0
) -> list[NDArray[np.float32]]:
    """Logits [len(sequence) - start, vocab] after each token of every sequence from its `start` on.

    The sequences go into the slots from `first_slot` on and stay there; with `first_slot` 0 the context forgets everything else.
    """
    if first_slot == 0:
        context.clear()
    lengths = [len(sequence) for sequence in sequences]
    tokens = np.fromiter((token for sequence in sequences for token in sequence), np.int32, sum(lengths))
    positions = np.concatenate([np.arange(length) for length in lengths])
    slots = np.repeat(np.arange(first_slot, first_slot + len(sequences)), lengths)
    wanted = positions >= np.repeat(starts, lengths)
    parts = []
    step = context.size.batch_tokens
    for start in range(0, len(tokens), step):
        cut = slice(start, start + step)
        parts.append(context.feed(tokens[cut], positions[cut], slots[cut], wanted[cut]).copy())
    counts = [length - start for length, start in zip(lengths, starts, strict=True)]
    return np.split(np.concatenate(parts), np.cumsum(counts)[:-1])


def sample_batch(
    context: Context,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    uniforms: NDArray[np.float64],
    max_model_len: int,
) -> Draws:
    """Sample one response per prompt, at most as many as the context has slots; equal neighbours share their prefill.

    `uniforms` [num_prompts, max_tokens] decide the draws.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    budgets = np.minimum(sampling.max_tokens, max_model_len - lengths)
    draws = Draws(
        np.zeros((len(prompts), sampling.max_tokens), np.int32),
        np.zeros((len(prompts), sampling.max_tokens), np.float32),
        np.zeros(len(prompts), np.int64),
    )
    rows, logits = _fill(context, prompts)  # which prompt each slot serves
    lengths = lengths[rows]
    stops = np.array(sampling.stop_token_ids, np.int64)
    for count in range(1, sampling.max_tokens + 1):
        tokens, logps = pick_tokens(logits, sampling.temperature, uniforms[rows, count - 1])
        draws.tokens[rows, count - 1] = tokens
        draws.logps[rows, count - 1] = logps
        finished = np.isin(tokens, stops) | (budgets[rows] <= count)
        if finished.any():
            draws.counts[rows[finished]] = count
            num_live = int((~finished).sum())
            if num_live == 0:
                break
            # The slots of a pass must follow each other: the last live ones move to where others have finished.
            holes = np.flatnonzero(finished[:num_live])
            movers = num_live + np.flatnonzero(~finished[num_live:])
            for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
                context.copy(mover, hole)
            for slot in range(num_live, len(rows)):
                context.drop(slot)
            for column in (rows, lengths, tokens):
                column[holes] = column[movers]
            rows, lengths, tokens = rows[:num_live], lengths[:num_live], tokens[:num_live]
        logits = context.feed(tokens, lengths, np.arange(len(rows)), np.ones(len(rows)))
        lengths = lengths + 1
    return draws


def _fill(context: Context, prompts: Sequence[tuple[int, ...]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Put each distinct prompt into a slot and copies behind them; which prompt is in each slot, and the logits after it."""
    starts, first = [], 0
    for _, same in groupby(prompts):
        starts.append(first)
        first += len(list(same))
    distinct = [prompts[i] for i in starts]
    parts: list[NDArray[np.float32]] = []
    for chunk in passes([len(prompt) for prompt in distinct], context.size.batch_tokens, len(distinct)):
        part = [distinct[i] for i in chunk]
        parts += logits_of(context, part, [len(prompt) - 1 for prompt in part], chunk.start)
    sources = np.repeat(np.arange(len(distinct)), np.diff([*starts, len(prompts)]))
    others = np.setdiff1d(np.arange(len(prompts)), starts)
    for slot, other in enumerate(others, len(distinct)):
        context.copy(int(sources[other]), slot)
    rows = np.concatenate([np.array(starts, np.int64), others])
    return rows, np.concatenate(parts)[sources[rows]]
