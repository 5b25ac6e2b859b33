"""A bare llama.cpp decode loop: what one would write by hand over its C interface for exactly one benchmark, and nothing more.

All prompts have one length, nothing stops early, no input is checked, and every sequence keeps its slot.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.worker import serve
from deploy_targets.engines.llamacpp_context import CACHE_TYPES, Context, ContextSize, Model
from deploy_targets.gguf_file import GGUF_FILE

ROWS_PER_PASS = 64
"""Sequences that are decoded together; more only fall out of the caches."""


def body(connection: Connection, folder: Path, prompts: list[list[int]], group_size: int, max_tokens: int, num_threads: int) -> None:
    """Answers ("one_batch" | "rows_split", seed) with (seconds, sampled tokens): all threads on each batch, or a batch for each thread."""
    model = Model(folder / GGUF_FILE, 0)
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    batches = [rows[start : start + ROWS_PER_PASS] for start in range(0, len(rows), ROWS_PER_PASS)]
    longest = len(prompts[0]) + max_tokens

    def context(threads: int) -> Context:
        size = ContextSize(ROWS_PER_PASS, longest, max(1024, ROWS_PER_PASS), threads, CACHE_TYPES["f16"], flash_attention=False)
        return Context(model, size)

    contexts = {"one_batch": [context(num_threads)], "rows_split": [context(1) for _ in range(num_threads)]}
    pools = {layout: ThreadPoolExecutor(len(made)) for layout, made in contexts.items()}

    def generate(layout: str, seed: int) -> tuple[float, int]:
        start = time.perf_counter()
        shares = [range(i, len(batches), len(contexts[layout])) for i in range(len(contexts[layout]))]

        def work(made: Context, share: range) -> int:
            return sum(decode(made, batches[i], group_size, max_tokens, seed + i) for i in share)

        sampled = sum(pools[layout].map(work, contexts[layout], shares))
        return time.perf_counter() - start, sampled

    serve(connection, generate)


def decode(context: Context, prompts: list[list[int]], group_size: int, max_tokens: int, seed: int) -> int:
    """One response of `max_tokens` tokens to each prompt, sampled at temperature 1 with its log-probs; equal neighbours share a prefill."""
    context.clear()
    num_rows, prompt_len = len(prompts), len(prompts[0])
    firsts = np.arange(0, num_rows, group_size)
    positions = np.tile(np.arange(prompt_len), len(firsts))
    ids = np.concatenate([prompts[i] for i in firsts])
    logits = context.feed(ids, positions, np.repeat(firsts, prompt_len), positions == prompt_len - 1)
    for row in range(num_rows):
        if row % group_size:
            context.copy(row - row % group_size, row)
    logits = np.repeat(logits, group_size, axis=0)[:num_rows]
    rng, rows, wanted = np.random.default_rng(seed), np.arange(num_rows), np.ones(num_rows)
    logps = np.empty((num_rows, max_tokens), np.float32)
    for step in range(max_tokens):
        logits = logits - logits.max(axis=1, keepdims=True)
        cumulative = np.exp(logits).cumsum(axis=1)
        totals = cumulative[:, -1].copy()
        cumulative[:, -1] = np.inf  # uniform * total may round up to the total
        tokens = (cumulative > (rng.random(num_rows) * totals)[:, None]).argmax(axis=1)
        logps[:, step] = logits[rows, tokens] - np.log(totals)
        if step + 1 < max_tokens:
            logits = context.feed(tokens, np.full(num_rows, prompt_len + step), rows, wanted)
    return logps.size
