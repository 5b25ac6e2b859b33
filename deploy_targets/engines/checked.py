"""An engine whose every answer is held against its question: what it says wrong is an error, not a rollout.

Shapes, token ids and versions are checked in every answer. An engine that gives other tokens than it sampled (a round trip through text, a
shifted index) shows once it is asked for the log-probs of its own words, which is done with the first that it samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deploy_targets.errors import EngineError
from deploy_targets.protocols import Engine
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile

NUM_OWN_WORDS = 8
"""Responses that an engine scores again."""
OWN_WORDS_MAX = 0.15
"""Mean abs(dp) between sampling and scoring that kernels never make, as a share of the mean of the larger probability; as in a proof."""
LARGEST_LOGP = 0.01
"""Rounding makes log-probs a little larger than 0."""


class CheckedEngine:
    """The engine protocol around an engine. Answers that cannot be right raise `EngineError`."""

    def __init__(self, engine: Engine, weight_version: int, vocab_size: int) -> None:
        """`weight_version`: what the engine was started on. `vocab_size`: of the learner, which embeds what was sampled."""
        self._engine, self.weight_version, self._vocab_size = engine, weight_version, vocab_size
        self._knows_its_words = False

    def update(self, weights: WeightFile) -> int:
        """See `Engine.update`."""
        served = self._engine.update(weights)
        if served != weights.weight_version:
            raise EngineError(f"it serves version {served} after an update to {weights.weight_version}")
        self.weight_version = served
        return served

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """See `Engine.generate`."""
        generations = self._engine.generate(prompts, sampling)
        self._check_count(len(generations), len(prompts), "prompts")
        for index, (generation, prompt) in enumerate(zip(generations, prompts, strict=True)):
            self._check_generation(f"response {index}", generation, prompt, sampling)
        if generations and not self._knows_its_words:
            self._check_own_words(generations[:: -(-len(generations) // NUM_OWN_WORDS)], sampling.temperature or 1.0)
            self._knows_its_words = True
        return generations

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """See `Engine.score`."""
        scores = self._engine.score(sequences, temperature)
        self._check_count(len(scores), len(sequences), "sequences")
        for index, (score, sequence) in enumerate(zip(scores, sequences, strict=True)):
            count = len(sequence.tokens) - sequence.prompt_len
            if len(score.greedy_tokens) != count:
                raise EngineError(f"score {index} has {len(score.greedy_tokens)} greedy tokens for {count} that were to be scored")
            self._check_logps(f"score {index}", score.logps, count)
            self._check_version(f"score {index}", score.weight_version)
        return scores

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def _check_generation(self, which: str, generation: Generation, prompt: Sequence[int], sampling: Sampling) -> None:
        tokens = generation.tokens
        if generation.prompt != tuple(prompt):
            raise EngineError(f"{which} is to another prompt than was asked")
        if not 1 <= len(tokens) <= sampling.max_tokens:
            raise EngineError(f"{which} has {len(tokens)} tokens; 1 to {sampling.max_tokens} were asked for")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise EngineError(f"{which} holds token ids outside the vocabulary, [0, {self._vocab_size}): {tokens.min()} to {tokens.max()}")
        self._check_logps(which, generation.logps, len(tokens))
        self._check_version(which, generation.weight_version)

    def _check_logps(self, which: str, logps: NDArray[np.float32], count: int) -> None:
        if len(logps) != count:
            raise EngineError(f"{which} has {len(logps)} log-probs for {count} tokens")
        # NaN, and infinite ones, are for the learner to mask out and to count.
        if (logps[np.isfinite(logps)] > LARGEST_LOGP).any():
            raise EngineError(f"{which} has log-probs above 0, up to {logps[np.isfinite(logps)].max():.3g}")

    def _check_version(self, which: str, weight_version: int) -> None:
        if weight_version != self.weight_version:
            raise EngineError(f"{which} is of version {weight_version} of the weights; {self.weight_version} is served")

    @staticmethod
    def _check_count(given: int, asked: int, what: str) -> None:
        if given != asked:
            raise EngineError(f"it gave {given} answers to {asked} {what}")

    def _check_own_words(self, generations: Sequence[Generation], temperature: float) -> None:
        scores = self.score([generation.sequence for generation in generations], temperature)
        said = np.exp(np.concatenate([generation.logps for generation in generations]).astype(np.float64))
        scored = np.exp(np.concatenate([score.logps for score in scores]).astype(np.float64))
        both = np.isfinite(said) & np.isfinite(scored)
        if not both.any():
            return
        gap, largest = float(np.abs(said - scored)[both].mean()), float(np.maximum(said, scored)[both].mean())
        if gap > OWN_WORDS_MAX * largest:
            raise EngineError(
                f"it scores its own words otherwise than it sampled them: mean abs(dp) {gap:.3f} over {both.sum()} tokens, more than "
                f"{OWN_WORDS_MAX * largest:.3f}. The tokens or the log-probs that it gives are not those that it sampled"
            )
