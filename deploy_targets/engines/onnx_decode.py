"""A decoder graph's key-value cache, in slots for the sampling loop: one prefill per distinct prompt, then single-token steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploy_targets.engines.onnx_graph import Graph

_FIRST_ROOM = 64
"""Response tokens that the cache first has room for; it doubles for the rows that need more, which are often few."""


class CacheSlots:
    """Slots are rows of inputs and outputs of the single-token step, see `sampling_loop.Slots`.

    `in_place`, past and present are bound to the same memory, so GroupQueryAttention appends in place. The attention mask is
    as wide as the cache from the start: the operator takes each row's length from its sum, and a step that changes no shape
    binds nothing anew. That is right on the CPU alone: for a device, ONNX Runtime copies an input when it is bound, and what
    is written to the memory later does not arrive. Otherwise inputs are handed over, and the cache comes back, at every step.
    """

    def __init__(self, graph: Graph, session: ort.InferenceSession, longest: int, prefill_tokens: int, in_place: bool) -> None:
        """`longest`: tokens that no sequence exceeds. A pass of the prefill holds at most `prefill_tokens` tokens or one prompt."""
        self._graph, self._session, self._in_place = graph, session, in_place
        self._longest, self._prefill_tokens = longest, prefill_tokens
        self._dtype = graph.cache_dtype(session)
        self._run_options = ort.RunOptions()
        self._binding: Any = None
        self._num_bound = -1

    def fill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Put each prompt into the slot of its own number."""
        graph, lengths = self._graph, np.array([len(prompt) for prompt in prompts])
        self._used = int(lengths.max())
        width = min(self._longest, self._used + _FIRST_ROOM)
        self._ids = np.zeros((len(prompts), 1), np.int64)
        self._logits = np.empty((len(prompts), 1, graph.vocab_size), self._dtype)
        self._mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        self._cache = [np.zeros((len(prompts), graph.num_kv_heads, width, graph.head_dim), self._dtype) for _ in graph.past_names]
        logits = np.empty((len(prompts), graph.vocab_size), np.float32)
        groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
        row = 0
        for chunk in chunks_by_tokens([len(prompt) for prompt, _ in groups], self._prefill_tokens):
            distinct = [groups[i][0] for i in chunk]
            repeats = [groups[i][1] for i in chunk]
            output, *cache = graph.prefill(self._session, distinct, with_cache=True)
            last = output[np.arange(len(chunk)), [len(prompt) - 1 for prompt in distinct]]
            rows = slice(row, row + sum(repeats))
            logits[rows] = np.repeat(last, repeats, axis=0)
            for target, source in zip(self._cache, cache, strict=True):
                target[rows, :, : source.shape[2]] = np.repeat(source, repeats, axis=0)
            row = rows.stop
        return np.arange(len(prompts)), logits

    def keep(self, num_live: int, holes: NDArray[np.int64], movers: NDArray[np.int64]) -> None:
        """Copy the filled part of the rows that move; those behind the live ones are given back when the cache next widens."""
        for array in self._cache:
            array[holes, :, : self._used] = array[movers, :, : self._used]
        self._mask[holes] = self._mask[movers]

    def step(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """One run of the graph over one token of each row."""
        num_live = len(tokens)
        self._used = int(lengths.max()) + 1
        self._ids[:num_live, 0] = tokens
        if self._used > self._mask.shape[1]:
            self._widen(num_live, min(self._longest, 2 * self._mask.shape[1]))
        self._mask[np.arange(num_live), lengths] = 1
        if not self._in_place:
            return self._step_by_copies(num_live)
        if num_live != self._num_bound:
            self._binding = self._bind(num_live)
            self._num_bound = num_live
        self._session.run_with_iobinding(self._binding, self._run_options)
        return self._logits[:num_live, 0].astype(np.float32, copy=False)

    def _widen(self, num_live: int, width: int) -> None:
        """Make room for `width` positions in the live rows, and give back the rows of the finished ones."""
        used = self._mask.shape[1]
        self._mask = np.pad(self._mask[:num_live], ((0, 0), (0, width - used)))
        for i, narrow in enumerate(self._cache):
            self._cache[i] = np.zeros((num_live, *narrow.shape[1:2], width, narrow.shape[3]), self._dtype)
            self._cache[i][:, :, :used] = narrow[:num_live]
        self._num_bound = -1

    def _step_by_copies(self, num_live: int) -> NDArray[np.float32]:
        past = {name: array[:num_live] for name, array in zip(self._graph.past_names, self._cache, strict=True)}
        feed = {"input_ids": self._ids[:num_live], "attention_mask": self._mask[:num_live], **past}
        logits, *self._cache = self._session.run(["logits", *self._graph.present_names], feed)
        return logits[:, 0].astype(np.float32, copy=False)  # type: ignore[no-any-return]

    def _bind(self, num_live: int) -> Any:
        binding = self._session.io_binding()
        for name, tokens in (("input_ids", self._ids), ("attention_mask", self._mask)):
            binding.bind_input(name, "cpu", 0, np.int64, (num_live, *tokens.shape[1:]), tokens.ctypes.data)
        binding.bind_output("logits", "cpu", 0, self._dtype, (num_live, *self._logits.shape[1:]), self._logits.ctypes.data)
        for past, present, array in zip(self._graph.past_names, self._graph.present_names, self._cache, strict=True):
            shape = (num_live, *array.shape[1:])
            binding.bind_input(past, "cpu", 0, self._dtype, shape, array.ctypes.data)
            binding.bind_output(present, "cpu", 0, self._dtype, shape, array.ctypes.data)
        return binding


def chunks_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Neighbouring rows whose padded batch holds at most `max_tokens` tokens, or one row where it alone holds more."""
    chunks, start, longest = [], 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > max_tokens:
            chunks.append(range(start, i))
            start, longest = i, length
    return [*chunks, range(start, len(lengths))] if lengths else []
