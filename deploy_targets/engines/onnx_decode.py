"""Batched sampling from a decoder graph: one prefill per distinct prompt, then a loop over a key-value cache that never moves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploy_targets.engines.draws import Draws, pick_tokens
from deploy_targets.engines.onnx_graph import Graph
from deploy_targets.types import Sampling

_FIRST_ROOM = 64
"""Response tokens that the cache first has room for; it doubles for the rows that need more, which are often few."""


class _Loop:
    """Inputs and outputs of the single-token step, whose first rows are the live ones.

    `in_place`, past and present are bound to the same memory, so GroupQueryAttention appends in place. The attention mask is
    as wide as the cache from the start: the operator takes each row's length from its sum, and a step that changes no shape
    binds nothing anew. That is right on the CPU alone: for a device, ONNX Runtime copies an input when it is bound, and what
    is written to the memory later does not arrive. Otherwise inputs are handed over, and the cache comes back, at every step.
    """

    def __init__(self, graph: Graph, session: ort.InferenceSession, num_rows: int, width: int, in_place: bool) -> None:
        self.graph, self.session, self.in_place = graph, session, in_place
        self.dtype = graph.cache_dtype(session)
        self.run_options = ort.RunOptions()
        self.ids = np.zeros((num_rows, 1), np.int64)
        self.logits = np.empty((num_rows, 1, graph.vocab_size), self.dtype)
        self.mask = np.zeros((num_rows, width), np.int64)
        self.cache = [np.zeros((num_rows, graph.num_kv_heads, width, graph.head_dim), self.dtype) for _ in graph.past_names]
        self.binding: Any = None
        self.num_bound = -1

    def widen(self, num_live: int, width: int) -> None:
        """Make room for `width` positions in the live rows, and give back the rows of the finished ones."""
        used = self.mask.shape[1]
        self.mask = np.pad(self.mask[:num_live], ((0, 0), (0, width - used)))
        for i, narrow in enumerate(self.cache):
            self.cache[i] = np.zeros((num_live, *narrow.shape[1:2], width, narrow.shape[3]), self.dtype)
            self.cache[i][:, :, :used] = narrow[:num_live]
        self.num_bound = -1

    def move(self, holes: NDArray[np.int64], movers: NDArray[np.int64], used: int) -> None:
        """Put the rows `movers` where the finished rows `holes` were; their first `used` positions are filled."""
        for array in self.cache:
            array[holes, :, :used] = array[movers, :, :used]
        self.mask[holes] = self.mask[movers]

    def step(self, num_live: int) -> NDArray[np.float32]:
        """Logits float32 [num_live, vocab], free to be overwritten, after one more token in each live row."""
        if not self.in_place:
            return self._step_by_copies(num_live)
        if num_live != self.num_bound:
            self.binding = self._bind(num_live)
            self.num_bound = num_live
        self.session.run_with_iobinding(self.binding, self.run_options)
        return self.logits[:num_live, 0].astype(np.float32, copy=False)

    def _step_by_copies(self, num_live: int) -> NDArray[np.float32]:
        past = {name: array[:num_live] for name, array in zip(self.graph.past_names, self.cache, strict=True)}
        feed = {"input_ids": self.ids[:num_live], "attention_mask": self.mask[:num_live], **past}
        logits, *self.cache = self.session.run(["logits", *self.graph.present_names], feed)
        return logits[:, 0].astype(np.float32, copy=False)  # type: ignore[no-any-return]

    def _bind(self, num_live: int) -> Any:
        binding = self.session.io_binding()
        for name, tokens in (("input_ids", self.ids), ("attention_mask", self.mask)):
            binding.bind_input(name, "cpu", 0, np.int64, (num_live, *tokens.shape[1:]), tokens.ctypes.data)
        binding.bind_output("logits", "cpu", 0, self.dtype, (num_live, *self.logits.shape[1:]), self.logits.ctypes.data)
        for past, present, array in zip(self.graph.past_names, self.graph.present_names, self.cache, strict=True):
            shape = (num_live, *array.shape[1:])
            binding.bind_input(past, "cpu", 0, self.dtype, shape, array.ctypes.data)
            binding.bind_output(present, "cpu", 0, self.dtype, shape, array.ctypes.data)
        return binding


def sample_batch(
    graph: Graph,
    session: ort.InferenceSession,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    uniforms: NDArray[np.float64],
    max_model_len: int,
    prefill_tokens: int,
    in_place: bool,
) -> Draws:
    """Sample one response per prompt; equal neighbours share their prefill.

    `uniforms` [num_prompts, max_tokens] decide the draws. A pass of the prefill holds at most `prefill_tokens` tokens or one prompt.
    `in_place` lets the operators write into the cache where it lies, for sessions on the CPU alone.
    """
    num_rows = len(prompts)
    lengths = np.array([len(prompt) for prompt in prompts])
    budgets = np.minimum(sampling.max_tokens, max_model_len - lengths)
    draws = Draws(
        np.zeros((num_rows, sampling.max_tokens), np.int32),
        np.zeros((num_rows, sampling.max_tokens), np.float32),
        np.zeros(num_rows, np.int64),
    )
    widest, longest = int((lengths + budgets).max()), int(lengths.max())
    loop = _Loop(graph, session, num_rows, min(widest, longest + _FIRST_ROOM), in_place)
    logits = _fill(loop, prompts, lengths, prefill_tokens)
    stops = np.array(sampling.stop_token_ids, np.int64)
    rows = np.arange(num_rows)  # which prompt each live row of the loop serves
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
            holes = np.flatnonzero(finished[:num_live])
            movers = num_live + np.flatnonzero(~finished[num_live:])
            loop.move(holes, movers, int(lengths.max()))
            for column in (rows, lengths, tokens):
                column[holes] = column[movers]
            rows, lengths, tokens = rows[:num_live], lengths[:num_live], tokens[:num_live]
        loop.ids[: len(rows), 0] = tokens
        if lengths.max() == loop.mask.shape[1]:
            loop.widen(len(rows), min(widest, 2 * int(lengths.max())))
        loop.mask[np.arange(len(rows)), lengths] = 1
        lengths += 1
        logits = loop.step(len(rows))
    return draws


def _fill(loop: _Loop, prompts: Sequence[tuple[int, ...]], lengths: NDArray[np.int64], prefill_tokens: int) -> NDArray[np.float32]:
    """Put the prompts into the cache; returns the logits [num_rows, vocab] after each prompt's last token."""
    loop.mask[:] = np.arange(loop.mask.shape[1]) < lengths[:, None]
    logits = np.empty((len(prompts), loop.graph.vocab_size), np.float32)
    groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
    row = 0
    for chunk in chunks_by_tokens([len(prompt) for prompt, _ in groups], prefill_tokens):
        distinct = [groups[i][0] for i in chunk]
        repeats = [groups[i][1] for i in chunk]
        output, *cache = loop.graph.prefill(loop.session, distinct, with_cache=True)
        last = output[np.arange(len(chunk)), [len(prompt) - 1 for prompt in distinct]]
        rows = slice(row, row + sum(repeats))
        logits[rows] = np.repeat(last, repeats, axis=0)
        for target, source in zip(loop.cache, cache, strict=True):
            target[rows, :, : source.shape[2]] = np.repeat(source, repeats, axis=0)
        row = rows.stop
    return logits


def chunks_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Neighbouring rows whose padded batch holds at most `max_tokens` tokens, or one row where it alone holds more."""
    chunks, start, longest = [], 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > max_tokens:
            chunks.append(range(start, i))
            start, longest = i, length
    return [*chunks, range(start, len(lengths))] if lengths else []
