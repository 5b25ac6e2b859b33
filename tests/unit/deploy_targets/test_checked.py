"""Answers of an engine that cannot be right: each is one error, and what is right passes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy_targets.engines.checked import CheckedEngine
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.engines.wire import pack_generations, pack_scores, unpack_generations
from deploy_targets.errors import EngineError
from deploy_targets.types import WEIGHTS_FILE, Generation, Sampling, TokenScores, TokenSequence, WeightFile
from tests.conftest import TinyModels

PROMPTS = [(3, 4), (5, 6), (5, 6)]
SAMPLING = Sampling(6, seed=1)
SEQUENCES = [TokenSequence((3, 4, 5, 6), 2), TokenSequence((7, 8, 9), 1)]
VOCAB_SIZE = 36


class Lying(FakeEngine):
    """The fake engine; its last answer of a call is changed by `generation` or `score`, and a list of them by `answers`."""

    generation: Callable[[Generation], Generation] = staticmethod(lambda item: item)
    scored: Callable[[TokenScores], TokenScores] = staticmethod(lambda item: item)
    answers: Callable[[list[Any]], list[Any]] = staticmethod(lambda items: items)
    served = 0

    def update(self, weights: WeightFile) -> int:
        return super().update(weights) + self.served

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        *others, last = super().generate(prompts, sampling)
        return self.answers([*others, self.generation(last)])

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        *others, last = super().score(sequences, temperature)
        return self.answers([*others, self.scored(last)])


@pytest.fixture
def lying(tiny_models: TinyModels) -> Lying:
    return Lying(tiny_models("qwen3"), {}, 3)


@pytest.fixture
def engine(lying: Lying) -> CheckedEngine:
    return CheckedEngine(lying, 3, VOCAB_SIZE)


def test_what_is_right_passes(engine: CheckedEngine, lying: Lying, tiny_models: TinyModels) -> None:
    for ours, theirs in zip(engine.generate(PROMPTS, SAMPLING), lying.generate(PROMPTS, SAMPLING), strict=True):
        np.testing.assert_array_equal(ours.logps, theirs.logps)
    assert engine.generate(PROMPTS, Sampling(6, 0.0))[0].temperature == 0
    assert len(engine.score(SEQUENCES, 0.7)) == 2
    assert engine.update(WeightFile(tiny_models("qwen3") / WEIGHTS_FILE, 4)) == engine.weight_version == 4
    assert engine.generate(PROMPTS, SAMPLING)[0].weight_version == 4
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.score(SEQUENCES)


@pytest.mark.fault("engine answers with wrong shapes, token ids or versions")
@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (lambda g: replace(g, logps=g.logps[:-1]), "has 5 log-probs for 6 tokens"),
        (lambda g: replace(g, tokens=g.tokens[:0], logps=g.logps[:0]), "has 0 tokens; 1 to 6"),
        (lambda g: replace(g, tokens=np.tile(g.tokens, 2), logps=np.tile(g.logps, 2)), "has 12 tokens; 1 to 6"),
        (lambda g: replace(g, tokens=g.tokens + 36), r"outside the vocabulary, \[0, 36\)"),
        (lambda g: replace(g, tokens=-1 - g.tokens), "outside the vocabulary"),
        (lambda g: replace(g, prompt=(5, 7)), "response 2 is to another prompt"),
        (lambda g: replace(g, weight_version=2), "is of version 2 of the weights; 3 is served"),
        (lambda g: replace(g, logps=-g.logps), "log-probs above 0"),
        (lambda g: replace(g, tokens=(g.tokens + 1) % 36), "scores its own words otherwise"),
    ],
)
def test_generations(engine: CheckedEngine, lying: Lying, lie: Callable[[Generation], Generation], says: str) -> None:
    lying.generation = lie  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=says):
        engine.generate(PROMPTS, SAMPLING)


@pytest.mark.fault("engine answers with wrong shapes, token ids or versions")
@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (lambda s: replace(s, logps=s.logps[1:]), "score 1 has 1 log-probs for 2 tokens"),
        (lambda s: replace(s, greedy_tokens=s.greedy_tokens[1:]), "score 1 has 1 greedy tokens for 2"),
        (lambda s: replace(s, weight_version=4), "is of version 4"),
    ],
)
def test_scores(engine: CheckedEngine, lying: Lying, lie: Callable[[TokenScores], TokenScores], says: str) -> None:
    lying.scored = lie  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=says):
        engine.score(SEQUENCES)


@pytest.mark.fault("engine answers with wrong shapes, token ids or versions")
@pytest.mark.parametrize("change", [lambda items: items[1:], lambda items: [*items, items[0]], lambda items: []])
def test_too_few_or_too_many(engine: CheckedEngine, lying: Lying, change: Callable[[list[Any]], list[Any]]) -> None:
    lying.answers = change  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"it gave \d answers to 3 prompts"):
        engine.generate(PROMPTS, SAMPLING)
    with pytest.raises(EngineError, match=r"it gave \d answers to 2 sequences"):
        engine.score(SEQUENCES)


@pytest.mark.fault("engine answers with wrong shapes, token ids or versions")
def test_another_version_after_an_update(engine: CheckedEngine, lying: Lying, tiny_models: TinyModels) -> None:
    lying.served = 1
    with pytest.raises(EngineError, match="serves version 5 after an update to 4"):
        engine.update(WeightFile(tiny_models("qwen3") / WEIGHTS_FILE, 4))


def test_log_probs_that_are_missing_are_let_through(tiny_models: TinyModels) -> None:
    """They are masked out and counted by who learns from them."""
    engine = CheckedEngine(FakeEngine(tiny_models("qwen3"), {"nan_logps": 1.0}, 0), 0, VOCAB_SIZE)
    assert np.isnan(engine.generate(PROMPTS, SAMPLING)[0].logps).all()


def test_nothing_that_does_not_fit_travels(lying: Lying, tmp_path: Path) -> None:
    """All answers of a call are one array: one that is too short would shift those behind it."""
    generations, scores = lying.generate(PROMPTS, SAMPLING), lying.score(SEQUENCES)
    generations[0] = replace(generations[0], logps=generations[0].logps[1:])
    with pytest.raises(EngineError, match="answer 0 of the engine has 6 and 5 tokens and log-probs"):
        pack_generations(generations)
    with pytest.raises(EngineError, match="answer 1 of the engine has 2 and 1 log-probs and greedy tokens"):
        pack_scores([scores[0], replace(scores[1], greedy_tokens=scores[1].greedy_tokens[1:])])
    packed = pack_generations(lying.generate(PROMPTS, SAMPLING))
    with pytest.raises(ValueError, match="values for lengths"):
        unpack_generations({**packed, "lengths": [6, 6, 5]}, PROMPTS)
