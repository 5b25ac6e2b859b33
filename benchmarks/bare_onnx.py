"""A bare ONNX Runtime decode loop with IO binding: what one would write by hand for exactly one benchmark, and nothing more.

All prompts have one length, nothing stops early, no input is checked, and the cache has its final size from the start.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.worker import serve
from deploy_targets.engines.onnx_graph import Graph

Draws = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Tokens and their log-probs, [num_rows, max_tokens] each."""


def body(connection: Connection, folder: Path, prompts: list[list[int]], group_size: int, max_tokens: int, num_threads: int) -> None:
    """Answers ("one_batch" | "rows_split", seed) with (seconds, sampled tokens) of one call."""
    graph = Graph.of(folder)
    one_session, split_session = open_session(graph, num_threads), open_session(graph, 1)
    pool = ThreadPoolExecutor(num_threads)

    def generate(layout: str, seed: int) -> tuple[float, int]:
        start = time.perf_counter()
        if layout == "one_batch":
            draws = [decode(graph, one_session, prompts, group_size, max_tokens, seed)]
        else:
            share = -(-len(prompts) // num_threads)
            parts = [prompts[first : first + share] for first in range(0, len(prompts), share)]
            futures = [pool.submit(decode, graph, split_session, part, group_size, max_tokens, seed + i) for i, part in enumerate(parts)]
            draws = [future.result() for future in futures]
        return time.perf_counter() - start, sum(tokens.size for tokens, _ in draws)

    serve(connection, generate)


def open_session(graph: Graph, num_threads: int) -> ort.InferenceSession:
    """ONNX Runtime's defaults, but for the number of threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])


def decode(graph: Graph, session: ort.InferenceSession, prompts: list[list[int]], group_size: int, max_tokens: int, seed: int) -> Draws:
    """`group_size` responses of `max_tokens` tokens to each prompt, sampled at temperature 1."""
    num_rows, prompt_len = len(prompts) * group_size, len(prompts[0])
    logits_of_prompts, *filled = graph.prefill(session, prompts, with_cache=True)
    logits = np.repeat(logits_of_prompts[:, -1], group_size, axis=0)
    width = prompt_len + max_tokens
    dtype = graph.cache_dtype(session)
    cache = [np.zeros((num_rows, graph.num_kv_heads, width, graph.head_dim), dtype) for _ in graph.past_names]
    for target, source in zip(cache, filled, strict=True):
        target[:, :, :prompt_len] = np.repeat(source, group_size, axis=0)
    ids, mask = np.zeros((num_rows, 1), np.int64), np.zeros((num_rows, width), np.int64)
    mask[:, :prompt_len] = 1
    out = np.empty((num_rows, 1, graph.vocab_size), dtype)
    binding = session.io_binding()
    for name, array in (("input_ids", ids), ("attention_mask", mask), *zip(graph.past_names, cache, strict=True)):
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in (("logits", out), *zip(graph.present_names, cache, strict=True)):
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    rng, rows = np.random.default_rng(seed), np.arange(num_rows)
    tokens = np.empty((num_rows, max_tokens), np.int64)
    logps = np.empty((num_rows, max_tokens), np.float32)
    for step in range(max_tokens):
        logits = logits.astype(np.float32, copy=False) - logits.max(axis=1, keepdims=True)
        cumulative = np.exp(logits).cumsum(axis=1)
        totals = cumulative[:, -1].copy()
        cumulative[:, -1] = np.inf  # uniform * total may round up to the total
        tokens[:, step] = (cumulative > (rng.random(num_rows) * totals)[:, None]).argmax(axis=1)
        logps[:, step] = logits[rows, tokens[:, step]] - np.log(totals)
        if step + 1 < max_tokens:
            ids[:, 0] = tokens[:, step]
            mask[:, prompt_len + step] = 1
            session.run_with_iobinding(binding)
            logits = out[:, 0]
    return tokens, logps
