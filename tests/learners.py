"""Learners of tiny models, and made-up rollouts for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploy_targets.profile import load_profile
from deploy_targets.protocols import Quantizer
from deploy_targets.quantizers.compressed_tensors import CompressedTensorsQuantizer
from deploy_targets.quantizers.kv_cache import CacheRounding
from deploy_targets.types import TokenSequence
from hetero_rl.config import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.types import TrainSequence

MakeLearner = Callable[..., Learner]


def quantizer_for(model_dir: Path) -> CompressedTensorsQuantizer:
    return CompressedTensorsQuantizer(load_profile("int4-vllm").scheme, json.loads((model_dir / "config.json").read_text()))


def unconstrained(model_dir: Path, quantizer: Quantizer, cache_rounding: CacheRounding | None = None, **options: object) -> Learner:
    """A learner without a signal; `options` are its `[learner]` table. The caller closes it."""
    return Learner(
        model_dir,
        quantizer,
        LearnerConfig.model_validate(options),
        AlgorithmConfig(),
        ConstraintConfig(signal="off"),
        temperature=1.0,
        num_updates=9,
        max_response_tokens=9,
        seed=0,
        cache_rounding=cache_rounding,
    )


def sequences(num: int = 12, seed: int = 0, longest: int = 9) -> list[TrainSequence]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        tokens = generator.integers(3, 30, generator.integers(1, longest + 1)).astype(np.int32)
        prompt = tuple(generator.integers(3, 30, generator.integers(1, 8)).tolist())
        made.append(
            TrainSequence(prompt, tokens, np.log(generator.uniform(0.01, 0.9, len(tokens))).astype(np.float32), float(generator.normal()))
        )
    return made


def as_sequences(batch: list[TrainSequence]) -> list[TokenSequence]:
    return [TokenSequence((*s.prompt, *map(int, s.tokens)), len(s.prompt)) for s in batch]


def grouped(num_prompts: int = 5, seed: int = 0) -> list[TrainSequence]:
    """Ragged groups: several prompts, each with responses of its own, in mixed order."""
    batch = [replace(s, prompt=prompt.prompt) for i, prompt in enumerate(sequences(num_prompts, seed)) for s in sequences(1 + i, seed + i)]
    np.random.default_rng(seed).shuffle(batch)
    return batch
