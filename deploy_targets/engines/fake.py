"""A stand-in for tests of everything around an engine: no model, numpy only, milliseconds a call.

Its "language model" reads the weights of a Hugging Face checkpoint (`none` quantizer): a decaying sum of the embeddings
of the tokens so far, multiplied with the output head, plus a bias made from every other tensor. So the log-probs depend
on all tokens before, and a tensor that is changed, lost or stale changes them. It resembles the real model in nothing else.

    profile = load_profile("fake")
    engine = open_engine(profile, folder, weight_version=1)      # folder: made by the profile's quantizer

Faults for tests, as `[engine.options]`: `nan_logps = 0.1` makes a tenth of the log-probs NaN, `stale = true` reports new
versions without loading them, `fail_updates = 2` refuses the first two updates with `EngineError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy_targets.engines.fake_options import FakeOptions
from deploy_targets.engines.requests import (
    check_layout,
    check_sequences,
    parse_options,
    read_layout,
    read_limits,
    response_limits,
)
from deploy_targets.errors import EngineError
from deploy_targets.types import WEIGHTS_FILE, Generation, Sampling, TokenScores, TokenSequence, WeightFile
from deploy_targets.weights_file import tensor_layout

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MEMORY_DECAY = 0.5
_LOGIT_STD = 2.0


class FakeEngine:
    """The whole engine protocol over a few lines of numpy."""

    def __init__(self, artifact_dir: Path, options: Mapping[str, Any], weight_version: int) -> None:
        """Read the folder's weights. Raises `ProfileError` for wrong options."""
        self._options = parse_options(FakeOptions, options, "fake")
        self._max_model_len, self._vocab_size = read_limits(artifact_dir, self._options.max_model_len)
        self._layout = read_layout(artifact_dir / WEIGHTS_FILE)
        self._failures_left = self._options.fail_updates
        self._is_open = True
        self.weight_version = weight_version
        self._load(artifact_dir / WEIGHTS_FILE)

    def _load(self, path: Path) -> None:
        tensors = _read_float_tensors(path)
        if _EMBEDDING not in tensors:
            raise EngineError(f"{path} has no {_EMBEDDING}; the fake engine reads Hugging Face checkpoints that are not quantized")
        self._embedding = tensors.pop(_EMBEDDING)
        self._head = tensors.pop(_HEAD, self._embedding)
        angles = np.arange(self._vocab_size, dtype=np.float64)
        self._bias = np.zeros(self._vocab_size)
        for index, name in enumerate(sorted(tensors)):
            weight = tensors[name].ravel()
            # A projection that sees order and scale: a permuted or rescaled tensor is another one.
            summary = float(weight @ np.cos(0.7 * np.arange(weight.size) + index)) / max(1.0, float(np.sqrt(weight.size)))
            self._bias += summary * np.cos(angles * (index + 1.3))
        self._scale = _LOGIT_STD / float(np.std(self._embedding @ self._head.T) + 1e-9)

    def _log_probs(self, state: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
        logits = (self._scale * (self._head @ state) + self._bias) / temperature
        shifted = logits - logits.max()
        normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
        return normalised

    def _state(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        state = np.zeros(self._embedding.shape[1])
        for token in tokens:
            state = _MEMORY_DECAY * state + self._embedding[token]
        return state

    def update(self, weights: WeightFile) -> int:
        """Load the file, unless a fault says otherwise."""
        self._check_open()
        if self._failures_left:
            self._failures_left -= 1
            raise EngineError(f"the fake engine was told to fail this update (option fail_updates): {weights.path}")
        check_layout(self._layout, weights.path)
        if not self._options.stale:
            self._load(weights.path)
        self.weight_version = weights.weight_version
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Sample each prompt with a generator of its own, made from (seed, index)."""
        self._check_open()
        limits = response_limits(prompts, sampling.max_tokens, self._max_model_len, self._vocab_size)
        return [self._generate_one(tuple(prompt), sampling, limits[index], index) for index, prompt in enumerate(prompts)]

    def _generate_one(self, prompt: tuple[int, ...], sampling: Sampling, limit: int, index: int) -> Generation:
        generator = np.random.default_rng([sampling.seed & 0xFFFFFFFF, index])
        state = self._state(prompt)
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < limit and (not tokens or tokens[-1] not in sampling.stop_token_ids):
            log_probs = self._log_probs(state, sampling.temperature or 1.0)
            uniform = generator.random()
            greedy = sampling.temperature == 0
            token = int(log_probs.argmax()) if greedy else min(int(np.exp(log_probs).cumsum().searchsorted(uniform)), self._vocab_size - 1)
            tokens.append(token)
            logps.append(float(log_probs[token]))
            state = _MEMORY_DECAY * state + self._embedding[token]
        return Generation(
            prompt=prompt,
            tokens=np.array(tokens, dtype=np.int32),
            logps=self._with_faults(np.array(logps, dtype=np.float32), generator),
            weight_version=self.weight_version,
            temperature=sampling.temperature,
            finish_reason="stop" if tokens[-1] in sampling.stop_token_ids else "length",
        )

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """The log-probs that `generate` would report for these tokens."""
        self._check_open()
        check_sequences(sequences, temperature, self._max_model_len, self._vocab_size)
        return [self._score_one(sequence, temperature, index) for index, sequence in enumerate(sequences)]

    def _score_one(self, sequence: TokenSequence, temperature: float, index: int) -> TokenScores:
        state = self._state(sequence.tokens[: sequence.prompt_len])
        logps: list[float] = []
        greedy_tokens: list[int] = []
        for token in sequence.tokens[sequence.prompt_len :]:
            log_probs = self._log_probs(state, temperature)
            logps.append(float(log_probs[token]))
            greedy_tokens.append(int(log_probs.argmax()))
            state = _MEMORY_DECAY * state + self._embedding[token]
        return TokenScores(
            logps=self._with_faults(np.array(logps, dtype=np.float32), np.random.default_rng([0, index])),
            greedy_tokens=np.array(greedy_tokens, dtype=np.int32),
            weight_version=self.weight_version,
            temperature=temperature,
        )

    def _with_faults(self, logps: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
        logps[generator.random(len(logps)) < self._options.nan_logps] = np.nan
        return logps

    def _check_open(self) -> None:
        if not self._is_open:
            raise EngineError("this fake engine is closed")

    def close(self) -> None:
        """Refuse later calls."""
        self._is_open = False


def _read_float_tensors(path: Path) -> dict[str, NDArray[np.float64]]:
    data = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {}
    for name, (dtype, shape, offset, length) in tensor_layout(path).items():
        raw = np.array(data[offset : offset + length])
        if dtype == "BF16":
            # numpy has no bfloat16: it is the upper half of a float32.
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif dtype in ("F32", "F16"):
            values = raw.view({"F32": np.float32, "F16": np.float16}[dtype])
        else:
            raise EngineError(
                f"{path}: tensor {name!r} is {dtype}; the fake engine reads bf16, fp16 and fp32, use it with scheme.quantizer = 'none'"
            )
        tensors[name] = values.astype(np.float64).reshape(shape)
    return tensors
