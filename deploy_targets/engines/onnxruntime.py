"""The engine for graphs of onnxruntime-genai's builder: ONNX Runtime and numpy, nothing else, in this process.

A session runs on one thread, and `num_threads` Python threads each drive a batch of their own through it: every operator,
the sampling included, then runs in parallel without a barrier after each of them, and nothing spins between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploy_targets.engines.draws import Draws, score_tokens
from deploy_targets.engines.environment import num_usable_cores
from deploy_targets.engines.onnx_decode import CacheSlots, chunks_by_tokens
from deploy_targets.engines.onnx_graph import Graph
from deploy_targets.engines.onnx_options import CPU_PROVIDER, OnnxRuntimeOptions, provider_problem
from deploy_targets.engines.requests import check_sequences, even_tokens, parse_options, response_limits
from deploy_targets.engines.sampling_loop import Batch, batches, generations, sample_batch
from deploy_targets.errors import EngineError, ProfileError
from deploy_targets.types import WEIGHTS_FILE, Generation, Sampling, TokenScores, TokenSequence, WeightFile

_LOGITS_PER_PASS = 1 << 26
"""Logits of one prefill or scoring pass, 256 MiB of float32."""
_TOKENS_PER_PASS = 2048
"""Tokens of one prefill or scoring pass: more only fall out of the caches."""


class OnnxRuntimeEngine:
    """One graph, one version of its weights; the key-value cache lies in host memory."""

    def __init__(self, artifact_dir: Path, options: dict[str, Any], weight_version: int) -> None:
        """Open the artifact. Raises `ProfileError` for bad options, `ArtifactError` or `EngineError` for a bad artifact."""
        self.options = parse_options(OnnxRuntimeOptions, options, "onnxruntime")
        known = ort.get_available_providers()
        if self.options.execution_provider not in known:
            raise ProfileError("onnxruntime cannot run this target here", [provider_problem(self.options.execution_provider, known)])
        self.graph = Graph.of(Path(artifact_dir))
        self._max_model_len = min(self.options.max_model_len, self.graph.context_length)
        num_threads = self.options.num_threads or num_usable_cores()
        self._num_batches = max(1, num_threads // self.options.threads_per_batch)
        self._pool = ThreadPoolExecutor(self._num_batches, thread_name_prefix="onnxruntime-batch")
        self._closed = False
        self._serve(WeightFile(Path(artifact_dir) / WEIGHTS_FILE, weight_version))

    def _serve(self, weights: WeightFile) -> None:
        self._session, self._weights = self.graph.session(weights.path, self.options.execution_provider, self.options.threads_per_batch)
        self.weight_version = weights.weight_version

    def update(self, weights: WeightFile) -> int:
        """Serve another version: a new session over the same graph and the mapped file. The old one serves until the new one stands.

        Raises `EngineError` naming each tensor that does not fit; the engine then still serves the old version.
        """
        self._check_open()
        if self.graph.layout is None:
            raise EngineError(f"{self.graph.path} brings its own weights, which cannot be swapped; nothing was changed")
        self._serve(weights)
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Sample one response per prompt, in order; request i draws from the i-th stretch of one generator seeded by `seed`.

        Raises `UsageError` for prompts that are empty, hold unknown tokens or leave no room for one token.
        """
        self._check_open()
        keys = [tuple(int(token) for token in prompt) for prompt in prompts]
        response_limits(keys, sampling.max_tokens, self._max_model_len, self.graph.vocab_size)
        parts = batches(keys, sampling, self.options.max_batch_size, self._num_batches)

        def draw(batch: Batch) -> Draws:
            longest = min(self._max_model_len, max(map(len, batch.prompts)) + sampling.max_tokens)
            slots = CacheSlots(
                self.graph,
                self._session,
                longest,
                self._tokens_per_pass(),
                in_place=self.options.execution_provider == CPU_PROVIDER,
            )
            return sample_batch(slots, batch, sampling, self._max_model_len)

        return generations(parts, self._map(draw, parts), sampling, self.weight_version)

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Teacher-forced log-probs of the response tokens, through the graph that also generates.

        Raises `UsageError` for sequences that are too long or hold unknown tokens.
        """
        self._check_open()
        check_sequences(sequences, temperature, self._max_model_len, self.graph.vocab_size)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
        lengths = [len(sequences[i].tokens) - 1 for i in order]
        chunks = chunks_by_tokens(lengths, even_tokens(lengths, self._tokens_per_pass(), self._num_batches))
        parts = [[order[i] for i in chunk] for chunk in chunks]

        def score_part(part: list[int]) -> list[TokenScores]:
            (logits,) = self.graph.prefill(self._session, [sequences[i].tokens[:-1] for i in part], with_cache=False)
            return [self._scores(logits[row], sequences[i], temperature) for row, i in enumerate(part)]

        found: dict[int, TokenScores] = {}
        for part, scores in zip(parts, self._map(score_part, parts), strict=True):
            found.update(zip(part, scores, strict=True))
        return [found[i] for i in range(len(sequences))]

    def close(self) -> None:
        """Give back threads, session and weights."""
        if not self._closed:
            self._closed = True
            self._pool.shutdown()
            del self._session, self._weights

    def _scores(self, logits: NDArray[np.floating[Any]], sequence: TokenSequence, temperature: float) -> TokenScores:
        rows = logits[sequence.prompt_len - 1 : len(sequence.tokens) - 1].astype(np.float32, copy=False)
        return TokenScores(*score_tokens(rows, sequence.tokens[sequence.prompt_len :], temperature), self.weight_version, temperature)

    def _tokens_per_pass(self) -> int:
        return min(_TOKENS_PER_PASS, max(1, _LOGITS_PER_PASS // self.graph.vocab_size))

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this onnxruntime engine is closed")

    def _map(self, function: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
        try:
            return list(self._pool.map(function, parts))
        except Exception as error:  # onnxruntime's exceptions share no base class below Exception
            raise EngineError(f"onnxruntime failed: {error}") from error
