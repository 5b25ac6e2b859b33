"""Batches of sequences through one llama.cpp context: teacher-forced logits, and its slots for the sampling loop."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from deploy_targets.engines.llamacpp_context import Context, passes


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


class ContextSlots:
    """The slots of a context, see `sampling_loop.Slots`; a batch may have as many prompts as there are slots."""

    def __init__(self, context: Context) -> None:
        """Use all slots of `context`."""
        self._context = context
        self._num_used = 0

    def fill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Put each distinct prompt into a slot, and copies behind them."""
        starts, first = [], 0
        for _, same in groupby(prompts):
            starts.append(first)
            first += len(list(same))
        distinct = [prompts[i] for i in starts]
        parts: list[NDArray[np.float32]] = []
        for chunk in passes([len(prompt) for prompt in distinct], self._context.size.batch_tokens, len(distinct)):
            part = [distinct[i] for i in chunk]
            parts += logits_of(self._context, part, [len(prompt) - 1 for prompt in part], chunk.start)
        sources = np.repeat(np.arange(len(distinct)), np.diff([*starts, len(prompts)]))
        others = np.setdiff1d(np.arange(len(prompts)), starts)
        for slot, other in enumerate(others, len(distinct)):
            self._context.copy(int(sources[other]), slot)
        rows = np.concatenate([np.array(starts, np.int64), others])
        self._num_used = len(rows)
        return rows, np.concatenate(parts)[sources[rows]]

    def keep(self, num_live: int, holes: NDArray[np.int64], movers: NDArray[np.int64]) -> None:
        """Move sequences within the context, and forget those that are over."""
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self._context.copy(mover, hole)
        for slot in range(num_live, self._num_used):
            self._context.drop(slot)
        self._num_used = num_live

    def step(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """One pass over one token of each slot."""
        return self._context.feed(tokens, lengths, np.arange(len(tokens)), np.ones(len(tokens)))
