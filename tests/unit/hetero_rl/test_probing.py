"""Sequences of each kind of probe, and what makes them of that kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from deploy_targets.probes import KINDS
from deploy_targets.profile import ProbeSpec
from deploy_targets.types import TokenSequence
from hetero_rl.learner.batching import Routes
from hetero_rl.learner.describe import Description
from hetero_rl.probing import (
    CERTAIN,
    LONG_SCORED,
    MIN_POLICY_SEQUENCES,
    certain_probes,
    enough_policy,
    long_sequences,
    make_probes,
    num_scored,
    rare_sequences,
)

POOL = [TokenSequence((1, *range(3, 3 + length), 2), 2) for length in (3, 8, 5)]


class Certain:
    """Certain of even tokens, not of odd ones."""

    def describe(self, sequences: Sequence[TokenSequence], *, routes: Sequence[Routes | None] = ()) -> list[Description]:
        return [described(s, np.array([token % 2 == 0 for token in s.tokens[s.prompt_len :]])) for s in sequences]


def described(sequence: TokenSequence, certain: np.ndarray) -> Description:
    count = num_scored(sequence)
    logps = np.where(certain, np.float32(np.log(CERTAIN) / 2), np.float32(-3))
    tokens = np.array(sequence.tokens[sequence.prompt_len :])
    return Description(logps, logps, np.arange(count, dtype=np.float32), tokens, tokens[:, None], logps[:, None])


@pytest.mark.parametrize("length", [16, 100, 1000])
def test_long_contexts_have_the_length_and_score_their_end(length: int) -> None:
    made = long_sequences(POOL, 200, length, seed=3)
    scored = min(LONG_SCORED, length // 2)
    assert {(len(s.tokens), num_scored(s)) for s in made} == {(length, scored)}
    assert 200 <= sum(map(num_scored, made)) < 200 + scored
    assert made == long_sequences(POOL, 200, length, seed=3) != long_sequences(POOL, 200, length, seed=4)
    assert all(s.tokens[0] == 1 for s in made)
    whole = {s.tokens for s in POOL}
    assert all(any(s.tokens[: len(tokens)] == tokens for tokens in whole) for s in made if length > 16)


@pytest.mark.parametrize("num_tokens", [20, 100, 250])
def test_rare_tokens_cover_the_vocabulary_evenly(num_tokens: int) -> None:
    ids = list(range(5, 105))
    made = rare_sequences(ids, 7, num_tokens, 32, seed=0)
    tokens = [token for s in made for token in s.tokens[1:]]
    assert {(s.tokens[0], s.prompt_len) for s in made} == {(7, 1)}
    assert max(map(num_scored, made)) == min(32, num_tokens)
    counts = Counter(tokens)
    assert len(tokens) == num_tokens
    assert set(counts) <= set(ids)
    assert max(counts.values()) - min(counts.get(i, 0) for i in ids) <= 1
    if num_tokens < len(ids):  # one from each of so many equal parts
        assert sorted((token - 5) // (100 // num_tokens) for token in tokens) == list(range(num_tokens))
    assert tokens != sorted(tokens)


def test_certain_tokens_are_the_longest_stretch_after_what_comes_before() -> None:
    sequence = TokenSequence((9, 9, 11, 12, 13, 14, 16, 18, 21), 2)
    (made,) = certain_probes([sequence], Certain().describe([sequence]), 10)
    assert made.kind == "certain"
    assert made.sequence == TokenSequence((9, 9, 11, 12, 13, 14, 16, 18), 5)
    assert made.learner_greedy.tolist() == [14, 16, 18]
    assert made.details is not None
    assert made.details.entropy.tolist() == [3, 4, 5]
    assert (np.exp(made.learner_logps) >= CERTAIN).all()


def test_certain_tokens_end_when_there_are_enough_or_none() -> None:
    certain, never = TokenSequence((1, 2, 4), 1), TokenSequence((1, 3, 5), 1)
    assert len(certain_probes([certain] * 9, Certain().describe([certain] * 9), 5)) == 3
    assert certain_probes([never] * 9, Certain().describe([never] * 9), 5) == []


def test_enough_policy_samples() -> None:
    spec = ProbeSpec(num_tokens=1000, greedy=0.1, long=0.1, rare=0.2, certain=0.1)
    short, long = [TokenSequence((1,) * 6, 1)] * 500, [TokenSequence((1,) * 101, 1)] * 500
    assert enough_policy(spec, short) == 100
    assert enough_policy(spec, long) == MIN_POLICY_SEQUENCES
    assert enough_policy(spec, short[:99]) is None
    assert enough_policy(spec, []) is None


def test_all_kinds_in_their_shares() -> None:
    spec = ProbeSpec(num_tokens=1000, greedy=0.1, long=0.15, rare=0.2, certain=0.05)
    greedy = [TokenSequence((1, 3 + i, 4, 6, 8, 9), 2) for i in range(60)]
    probes = make_probes(spec, Certain(), POOL * 20, greedy * 2, max_len=129, ordinary_ids=range(3, 40), seed=0)
    counts = {kind: sum(len(p.learner_logps) for p in probes if p.kind == kind) for kind in KINDS}
    assert counts == {"policy": 20 * 16, "greedy": 100, "long": 192, "rare": 200, "certain": 51}
    assert [p.kind for p in probes] == sorted((p.kind for p in probes), key=KINDS.index)
    of_kind = {kind: [p.sequence for p in probes if p.kind == kind] for kind in KINDS}
    assert of_kind["greedy"] == greedy[:25]
    assert {s.tokens[:2] for s in of_kind["certain"]}.isdisjoint(s.tokens[:2] for s in of_kind["greedy"])
    for p in probes:
        assert p.learner_greedy.tolist() == list(p.sequence.tokens[p.sequence.prompt_len :])
        assert p.details is not None


def test_long_len_is_bounded_by_the_target() -> None:
    spec = ProbeSpec(long_len=64)
    for max_len, length in ((32, 31), (128, 64)):
        probes = make_probes(spec, Certain(), POOL, [], max_len=max_len, ordinary_ids=range(3, 40), seed=0)
        assert {len(p.sequence.tokens) for p in probes if p.kind == "long"} == {length}
        assert max(len(p.sequence.tokens) for p in probes) <= max_len
