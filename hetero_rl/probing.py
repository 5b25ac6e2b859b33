"""Golden probes of every kind from two pools of sequences: samples and greedy continuations of whoever is deployed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploy_targets.probes import Kind, LearnerDetails, Probe
from deploy_targets.profile import ProbeSpec
from deploy_targets.types import TokenSequence
from hetero_rl.learner.batching import Routes
from hetero_rl.learner.describe import Description

LONG_SCORED = 64
"""Tokens scored at the end of a long context: contexts are dear, and an interval wants several."""
RARE_LEN = 32
"""Scored tokens of a rare-token sequence."""
MIN_POLICY_SEQUENCES = 32
"""Policy samples there are at least, however long they are: intervals are over sequences."""
CERTAIN = 0.99
"""Least probability of each token of a near-certain stretch, in float32."""
CERTAIN_POOL = 4
"""Greedy tokens looked through for one near-certain token that is wanted."""


class Describes(Protocol):
    """The learner, or a model that is only read."""

    def describe(self, sequences: Sequence[TokenSequence], *, routes: Sequence[Routes | None] = ()) -> list[Description]:
        """What it says about the response tokens, in order; `routes`: those of the engine that sampled them, for a model that follows."""
        ...


def make_probes(
    spec: ProbeSpec,
    model: Describes,
    policy: Sequence[TokenSequence],
    greedy: Sequence[TokenSequence],
    *,
    max_len: int,
    ordinary_ids: Sequence[int],
    seed: int,
    routes: Mapping[TokenSequence, Routes] = MappingProxyType({}),
) -> tuple[Probe, ...]:
    """All of `policy`, and probes of the other kinds in the shares of `spec`, described by `model`.

    `greedy` beyond what its share takes is what near-certain stretches are looked for in; where nothing is left, there are none.
    `max_len`: tokens of the longest sequence that the target serves. `ordinary_ids`: the vocabulary without special tokens.
    `routes`: what the engine that sampled a sequence chose in it, where it tells.
    """
    assert policy, "the gates on the gap rest on policy samples"
    wanted: dict[Kind, int] = {"policy": sum(map(num_scored, policy))}
    wanted |= {kind: round(spec.num_tokens * getattr(spec, kind)) for kind in ("greedy", "long", "rare", "certain")}
    greedy = list(dict.fromkeys(greedy))
    taken = len(_first(greedy, wanted["greedy"]))
    # A server that is asked about a prompt has to have room for a token of its own.
    length = min(max_len - 1, spec.long_len or max_len)
    sequences: dict[Kind, list[TokenSequence]] = {
        "policy": list(policy),
        "greedy": greedy[:taken],
        "long": long_sequences(policy, wanted["long"], length, seed),
        "rare": rare_sequences(ordinary_ids, policy[0].tokens[0], wanted["rare"], min(RARE_LEN, max_len - 1), seed),
    }
    pool = _first(greedy[taken:], CERTAIN_POOL * wanted["certain"])
    flat = [(kind, sequence) for kind in sequences for sequence in sequences[kind]]
    described = _described(model, [sequence for _, sequence in flat] + pool, routes)
    probes = [_probe(kind, sequence, said) for (kind, sequence), said in zip(flat, described, strict=False)]
    return (*probes, *certain_probes(pool, described[len(flat) :], wanted["certain"]))


def long_sequences(pool: Sequence[TokenSequence], num_tokens: int, length: int, seed: int) -> list[TokenSequence]:
    """Contexts of exactly `length` tokens, prompts and responses of `pool` one after the other, of which the end is scored.

    Together they have `num_tokens` scored tokens or a few more.
    """
    scored = min(LONG_SCORED, length // 2)
    generator = np.random.default_rng([seed, 0])
    made = []
    for _ in range(-(-num_tokens // scored)):
        tokens: list[int] = []
        while len(tokens) < length:
            for index in generator.permutation(len(pool)).tolist():
                tokens += pool[index].tokens
                if len(tokens) >= length:
                    break
        made.append(TokenSequence(tuple(tokens[:length]), length - scored))
    return made


def rare_sequences(ids: Sequence[int], start: int, num_tokens: int, num_scored: int, seed: int) -> list[TokenSequence]:
    """`num_tokens` tokens from all over the sorted `ids`, in random order, cut into sequences that begin with `start`.

    Each id is there as often as any other, give or take one; of a vocabulary that is larger, one id from each of `num_tokens` equal parts.
    """
    generator = np.random.default_rng([seed, 1])
    whole, rest = divmod(num_tokens, len(ids))
    edges = np.linspace(0, len(ids), rest + 1).astype(int)
    drawn = [*range(len(ids))] * whole + generator.integers(edges[:-1], edges[1:]).tolist()
    tokens = [ids[index] for index in generator.permutation(drawn)]
    return [TokenSequence((start, *tokens[begin : begin + num_scored]), 1) for begin in range(0, num_tokens, num_scored)]


def certain_probes(sequences: Sequence[TokenSequence], described: Sequence[Description], num_tokens: int) -> list[Probe]:
    """Of each sequence its longest stretch of near-certain tokens, after all that comes before it; until there are `num_tokens` of them."""
    probes: list[Probe] = []
    for sequence, said in zip(sequences, described, strict=True):
        begin, end = _longest_run(said.logps_fp32 >= np.log(CERTAIN))
        if sum(len(probe.learner_logps) for probe in probes) >= num_tokens:
            break
        if begin < end:
            cut = TokenSequence(sequence.tokens[: sequence.prompt_len + end], sequence.prompt_len + begin)
            probes.append(_probe("certain", cut, said, slice(begin, end)))
    return probes


def enough_policy(spec: ProbeSpec, sequences: Sequence[TokenSequence]) -> int | None:
    """How many of the first `sequences` make the policy's share of `spec`; None where they are too few."""
    counts = np.cumsum([num_scored(sequence) for sequence in sequences])
    enough = max(int(np.searchsorted(counts, round(spec.num_tokens * spec.policy))) + 1, MIN_POLICY_SEQUENCES)
    return enough if enough <= len(sequences) else None


def num_scored(sequence: TokenSequence) -> int:
    """Tokens of the response."""
    return len(sequence.tokens) - sequence.prompt_len


def _described(model: Describes, sequences: Sequence[TokenSequence], routes: Mapping[TokenSequence, Routes]) -> list[Description]:
    """In order; sequences with routes and those without apart, since a batch has them for all or for none."""
    found: dict[int, Description] = {}
    for has_routes in (True, False):
        places = [index for index, sequence in enumerate(sequences) if (sequence in routes) == has_routes]
        part = [sequences[index] for index in places]
        if part:
            found.update(zip(places, model.describe(part, routes=[routes.get(sequence) for sequence in part]), strict=True))
    return [found[index] for index in range(len(sequences))]


def _first(sequences: Iterable[TokenSequence], num_tokens: int) -> list[TokenSequence]:
    """As many of the first sequences as it takes to have `num_tokens` scored tokens."""
    taken: list[TokenSequence] = []
    count = 0
    for sequence in sequences:
        if count >= num_tokens:
            break
        taken.append(sequence)
        count += num_scored(sequence)
    return taken


def _longest_run(flags: NDArray[np.bool_]) -> tuple[int, int]:
    """Begin and end of the longest run of True; equal where there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


def _probe(kind: Kind, sequence: TokenSequence, said: Description, part: slice = slice(None)) -> Probe:
    details = LearnerDetails(
        said.logps_fp32[part].astype(np.float32),
        said.entropy[part].astype(np.float32),
        said.top_ids[part].astype(np.int32),
        said.top_logps[part].astype(np.float32),
    )
    return Probe(sequence, said.logps[part].astype(np.float32), said.greedy_tokens[part].astype(np.int32), kind, details)
