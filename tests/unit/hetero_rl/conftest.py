"""Learners for the tests of this folder; they are closed after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy_targets.protocols import Quantizer
from deploy_targets.quantizers.kv_cache import CacheRounding
from hetero_rl.config import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.learner.deepspeed_learner import Learner
from tests.conftest import TinyModels
from tests.learners import MakeLearner, quantizer_for


@pytest.fixture
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models("qwen3")


@pytest.fixture
def make_learner(model_dir: Path) -> Iterator[MakeLearner]:
    made: list[Learner] = []

    def make(
        signal: str = "off",
        folder: Path = model_dir,
        algorithm: AlgorithmConfig | None = None,
        cache_rounding: CacheRounding | None = None,
        quantizer: Quantizer | None = None,
        **options: object,
    ) -> Learner:
        config = LearnerConfig.model_validate({"lr": 1e-3, "warmup_steps": 0, **options})
        constraint = ConstraintConfig.model_validate({"signal": signal})
        learner = Learner(
            folder,
            quantizer or quantizer_for(folder),
            config,
            algorithm or AlgorithmConfig(),
            constraint,
            temperature=1.0,
            num_updates=100,
            max_response_tokens=9,
            seed=0,
            cache_rounding=cache_rounding,
        )
        made.append(learner)
        return learner

    yield make
    for learner in made:
        learner.close()
