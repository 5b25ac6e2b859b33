"""The engine for GGUF files: llama.cpp in this process, through llama-cpp-python's C interface; sampling in numpy.

As many contexts as there are cores share the weights and each serve batches of their own on one thread: small models then lose
nothing at the barrier that llama.cpp puts after every operator. Sampling sees all logits, without top-k, top-p or penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from deploy_targets.engines.draws import Draws, score_tokens
from deploy_targets.engines.llamacpp_context import CACHE_TYPES, Context, ContextSize, Model, passes
from deploy_targets.engines.llamacpp_decode import ContextSlots, logits_of
from deploy_targets.engines.llamacpp_options import LlamaCppOptions
from deploy_targets.engines.requests import check_sequences, compare_layouts, even_tokens, parse_options, read_limits, response_limits
from deploy_targets.engines.sampling_loop import Batch, batches, generations, sample_batch
from deploy_targets.errors import ArtifactError, EngineError
from deploy_targets.gguf_file import GGUF_FILE, GgufHeader, read_gguf
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile

_LOGITS_PER_PASS = 1 << 26
"""Logits of one pass, 256 MiB of float32."""
_NAME_KEYS = ("general.name",)
"""Metadata that may differ between versions."""


class LlamaCppEngine:
    """One GGUF file, served from host memory."""

    def __init__(self, artifact_dir: Path, options: dict[str, Any], weight_version: int) -> None:
        """Open the artifact. Raises `ProfileError` for bad options, `ArtifactError` or `EngineError` for a bad artifact."""
        self.options = parse_options(LlamaCppOptions, options, "llamacpp")
        folder = Path(artifact_dir)
        self._header = read_gguf(folder / GGUF_FILE)
        num_embeddings = self._header.num_embeddings
        if (folder / "config.json").is_file():
            self._max_model_len, self._vocab_size = read_limits(folder, self.options.max_model_len)
        else:  # a file by itself, as other tools leave it
            self._max_model_len = min(self.options.max_model_len, self._header.context_length or self.options.max_model_len)
            self._vocab_size = num_embeddings
        if num_embeddings != self._vocab_size:
            raise ArtifactError(f"{GGUF_FILE} has {num_embeddings} token embeddings, config.json says vocab_size {self._vocab_size}")
        self._num_batches = self.options.num_batches()
        self._pool = ThreadPoolExecutor(self._num_batches, thread_name_prefix="llamacpp-batch")
        self._model: Model | None = None
        self._contexts: list[Context] = []
        self._closed = False
        try:
            self.update(WeightFile(folder / GGUF_FILE, weight_version))
        except BaseException:
            self.close()
            raise

    def update(self, weights: WeightFile) -> int:
        """Serve another version: its file is opened and checked, then the old caches give way to new ones: there is one set of them.

        Raises `EngineError` naming each tensor or entry of metadata in which the file differs from the model in service, or why
        llama.cpp refuses it; the engine then still serves the old version, with caches made anew if the old ones had given way.
        Should these fail too, the engine is closed.
        """
        self._check_open()
        _check_same_model(self._header, weights.path)
        model = Model(weights.path, self.options.num_gpu_layers)
        old = self._model
        try:
            if model.vocab_size != self._vocab_size:
                raise EngineError(f"{weights.path}: llama.cpp reads {model.vocab_size} tokens, config.json says {self._vocab_size}")
            self._make_contexts(model)
        except BaseException:
            if old is not None and len(self._contexts) < self._num_batches:
                try:
                    self._make_contexts(old)
                except BaseException:
                    self.close()
                    model.close()
                    raise
            model.close()
            raise
        if old is not None:
            old.close()
        self._model = model
        self.weight_version = weights.weight_version
        return self.weight_version

    def _make_contexts(self, model: Model) -> None:
        """Give back the contexts there are and make those of `model`; none is left when that fails."""
        _close_all(self._contexts)
        self._contexts = []
        made: list[Context] = []
        try:
            for _ in range(self._num_batches):
                made.append(Context(model, self._size()))
        except BaseException:
            _close_all(made)
            raise
        self._contexts = made

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Sample one response per prompt, in order; request i draws from the i-th stretch of one generator seeded by `seed`.

        Raises `UsageError` for prompts that are empty, hold unknown tokens or leave no room for one token.
        """
        self._check_open()
        keys = [tuple(int(token) for token in prompt) for prompt in prompts]
        response_limits(keys, sampling.max_tokens, self._max_model_len, self._vocab_size)
        parts = batches(keys, sampling, self.options.max_batch_size, self._num_batches)

        def draw(context: Context, batch: Batch) -> Draws:
            return sample_batch(ContextSlots(context), batch, sampling, self._max_model_len)

        return generations(parts, self._map(draw, parts), sampling, self.weight_version)

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Teacher-forced log-probs of the response tokens, by the same matrix products that generate.

        Raises `UsageError` for sequences that are too long or hold unknown tokens.
        """
        self._check_open()
        check_sequences(sequences, temperature, self._max_model_len, self._vocab_size)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
        size = self._size()
        lengths = [len(sequences[i].tokens) for i in order]
        chunks = passes(lengths, even_tokens(lengths, size.batch_tokens, self._num_batches), size.num_slots)

        def score_chunk(context: Context, chunk: range) -> list[TokenScores]:
            chosen = [sequences[order[i]] for i in chunk]
            rows = logits_of(context, [s.tokens[:-1] for s in chosen], [s.prompt_len - 1 for s in chosen])
            return [
                TokenScores(*score_tokens(logits, s.tokens[s.prompt_len :], temperature), self.weight_version, temperature)
                for logits, s in zip(rows, chosen, strict=True)
            ]

        found: dict[int, TokenScores] = {}
        for chunk, scores in zip(chunks, self._map(score_chunk, chunks), strict=True):
            found.update(zip((order[i] for i in chunk), scores, strict=True))
        return [found[i] for i in range(len(sequences))]

    def close(self) -> None:
        """Give back threads, caches and weights."""
        if not self._closed:
            self._closed = True
            self._pool.shutdown()
            _close_all(self._contexts)
            if self._model is not None:
                self._model.close()
            self._contexts, self._model = [], None

    def _size(self) -> ContextSize:
        options = self.options
        batch_tokens = min(options.max_batch_tokens, max(options.max_batch_size, _LOGITS_PER_PASS // self._vocab_size))
        return ContextSize(
            num_slots=options.max_batch_size,
            max_model_len=self._max_model_len,
            batch_tokens=max(batch_tokens, options.max_batch_size),
            num_threads=options.threads_per_batch,
            cache_type=CACHE_TYPES[options.kv_cache_dtype],
            flash_attention=options.flash_attention,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this llamacpp engine is closed")

    def _map(self, function: Callable[[Context, Any], Any], parts: Sequence[Any]) -> list[Any]:
        """`function` of each part, every running call with a context of its own."""
        free: SimpleQueue[Context] = SimpleQueue()
        for context in self._contexts:
            free.put(context)

        def run(part: Any) -> Any:
            context = free.get()
            try:
                return function(context, part)
            finally:
                free.put(context)

        return list(self._pool.map(run, parts))


def _check_same_model(served: GgufHeader, path: Path) -> None:
    """Raise `EngineError` unless `path` holds the tensors and metadata of the model in service, whatever their values."""
    try:
        given = read_gguf(path)
    except ArtifactError as error:
        raise EngineError(f"{path} cannot be served: {error}") from error
    expected = {name: (kind, shape) for name, (kind, shape, _, _) in served.tensors.items()}
    compare_layouts(expected, {name: (kind, shape) for name, (kind, shape, _, _) in given.tensors.items()}, path)
    keys = sorted(
        key
        for key in served.metadata.keys() | given.metadata.keys()
        if key not in _NAME_KEYS and served.metadata.get(key) != given.metadata.get(key)
    )
    if keys:
        raise EngineError(f"{path} does not fit the model in service, nothing was changed: its metadata differ in {', '.join(keys)}")


def _close_all(contexts: Sequence[Context]) -> None:
    for context in contexts:
        context.close()
