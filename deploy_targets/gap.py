"""The gap between what learned and what serves, on the probes: per-token arrays, the measures made of them, and where it lies.

With d = learner_logp - engine_logp on a scored token, both at the probes' temperature, over the tokens with a finite engine log-prob:

    abs_dp_mean, _p50, _p99, _max    of abs(exp(learner_logp) - exp(engine_logp)); a quantile is the smallest value with that share up to it
    kl_k1                            mean of -d                 estimate of KL(engine || learner), nats, unbiased, of either sign
    kl_k3                            mean of exp(d) - 1 - d     estimate of the same, never negative, low variance
    chi2                             mean of (exp(d) - 1)^2     estimate of chi^2(learner || engine), never negative, heavy-tailed
    effective_share                  (sum w)^2 / (N sum w^2), w = exp(d): effective sample size of N importance weights p_learner / p_engine
    greedy_agreement                 share of tokens at which both sides have the same most probable token
    no_divergence_share              share of sequences whose most probable tokens agree at every position
    first_divergence_p50             of the others, the median of the first position (from 0, in the response) at which they do not
    nonfinite_share                  tokens without a finite engine log-prob, of all tokens; they are in no other measure

The same formulas as a run's, hetero_rl/algorithm/discrepancy.py and corrections.py; k1 and k3 are those of http://joschu.net/blog/kl-approx.html
with q = engine, p = learner. k1, k3 and chi2 are estimates where the engine sampled the tokens at the probes' temperature; on tokens from
elsewhere they are distances only. How intervals are made: `bootstrap.py`.

The learner's log-probs are those of its own arithmetic, which training was held against; what float32 makes of the same weights is apart,
in `LearnerNoise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy_targets.bootstrap import CONFIDENCE, Floats, Measure, binned_sums, largest, mean, measure, quantile, ratio, ratios
from deploy_targets.probes import Probe
from deploy_targets.types import TokenScores

POSITION_EDGES = (1, 8, 32, 128, 512, 2048)
PROBABILITY_EDGES = (0.1, 0.5, 0.9, 0.99)
ENTROPY_EDGES = (0.01, 0.1, 0.5, 1.0, 2.0)
"""Nats."""


@dataclass(frozen=True)
class Gap:
    """What both sides say about the probes that were replayed, at the positions where the engine's log-prob is finite.

    `learner_logps`, `engine_logps`: float64 [num_tokens], nats. `greedy_agrees`: bool [num_tokens]. `token_ids`: int32 [num_tokens].
    `sequence`: int [num_tokens], rising from 0 without a hole. `position` (in the response): int [num_tokens].
    `nonfinite`, `scored`: int [num_replayed], tokens without a finite engine log-prob and all tokens, of each sequence replayed.
    `num_different`: how many of the sequences replayed differ from each other; None where that is not known.
    `fp32_logps`, `entropy`: float64 [num_tokens], nats, as `LearnerDetails` has them; None where not every probe has details.
    """

    learner_logps: Floats
    engine_logps: Floats
    greedy_agrees: NDArray[np.bool_]
    token_ids: NDArray[np.int32]
    sequence: NDArray[np.int_]
    position: NDArray[np.int_]
    nonfinite: NDArray[np.int_]
    scored: NDArray[np.int_]
    fp32_logps: Floats | None = None
    entropy: Floats | None = None
    num_different: int | None = None

    @classmethod
    def of(cls, probes: Sequence[Probe], scores: Sequence[TokenScores]) -> Gap:
        """From probes and the engine's scores of the same sequences, in the same order."""
        lengths = np.array([len(probe.learner_logps) for probe in probes], dtype=np.int64)
        engine_logps = _joined((score.logps for score in scores), np.float64)
        finite = np.isfinite(engine_logps)
        replayed = np.repeat(np.arange(len(lengths)), lengths)
        sequence = replayed[finite]
        agrees = _joined((probe.learner_greedy for probe in probes), np.int64) == _joined((s.greedy_tokens for s in scores), np.int64)
        details = [probe.details for probe in probes if probe.details is not None]
        has_details = bool(details) and len(details) == len(probes)
        tokens = chain.from_iterable(probe.sequence.tokens[probe.sequence.prompt_len :] for probe in probes)
        return cls(
            learner_logps=_joined((probe.learner_logps for probe in probes), np.float64)[finite],
            engine_logps=engine_logps[finite],
            greedy_agrees=agrees[finite],
            token_ids=np.fromiter(tokens, np.int32, len(replayed))[finite],
            sequence=np.cumsum(np.diff(sequence, prepend=sequence[:1]) > 0),
            position=(np.arange(len(replayed)) - np.repeat(np.cumsum(lengths) - lengths, lengths))[finite],
            nonfinite=np.bincount(replayed[~finite], minlength=len(lengths)),
            scored=lengths,
            fp32_logps=_joined((said.logps_fp32 for said in details), np.float64)[finite] if has_details else None,
            entropy=_joined((said.entropy for said in details), np.float64)[finite] if has_details else None,
            num_different=len({probe.sequence for probe in probes}),
        )

    @property
    def num_tokens(self) -> int:
        """Finite tokens."""
        return len(self.engine_logps)

    @property
    def num_sequences(self) -> int:
        """Sequences with at least one finite token."""
        return int(self.sequence[-1]) + 1 if self.num_tokens else 0

    @property
    def num_nonfinite(self) -> int:
        """Tokens left out because the engine's log-prob was not finite."""
        return int(self.nonfinite.sum())

    @cached_property
    def log_ratio(self) -> Floats:
        """The difference learner_logp - engine_logp of each token, nats."""
        return self.learner_logps - self.engine_logps

    @cached_property
    def abs_dp(self) -> Floats:
        """abs(p_learner - p_engine) of each token."""
        difference: Floats = np.exp(self.learner_logps) - np.exp(self.engine_logps)
        return np.abs(difference)

    @cached_property
    def measures(self) -> Mapping[str, Measure]:
        """Every measure of `MEASURES` with its 95 % interval."""
        return {name: self.measure(name) for name in MEASURES}

    def measure(self, name: str, confidence: float | None = CONFIDENCE) -> Measure:
        """One of `MEASURES`, with an interval of the given confidence; None: without one, which is quick."""
        return MEASURES[name](self, confidence)

    def mean_of(self, values: Floats, confidence: float | None = CONFIDENCE) -> Measure:
        """Mean over tokens of `values` [num_tokens], interval over sequences."""
        return mean(values, self.sequence, self.num_sequences, confidence)

    @property
    def perplexity(self) -> tuple[float | None, float | None]:
        """The learner's and the engine's: exp of the mean negative log-prob of the probe tokens; infinite where exp overflows."""
        if not self.num_tokens:
            return None, None
        with np.errstate(over="ignore"):
            return float(np.exp(-self.learner_logps.mean())), float(np.exp(-self.engine_logps.mean()))

    @cached_property
    def learner_noise(self) -> LearnerNoise | None:
        """What the learner's rounding has to do with the gap; None where its log-probs are not known in float32, or no token is finite."""
        if self.fp32_logps is None or not self.num_tokens:
            return None
        p, p_fp32, p_engine = (np.exp(logps) for logps in (self.learner_logps, self.fp32_logps, self.engine_logps))
        to_fp32 = np.abs(p_fp32 - p_engine)
        return LearnerNoise(*(self.mean_of(values) for values in (np.abs(p - p_fp32), to_fp32, self.abs_dp - to_fp32)))

    def by_position(self) -> tuple[Slice, ...]:
        """The gap along the response."""
        starts = (0, *POSITION_EDGES)
        labels = [_span(begin, end) for begin, end in zip(starts, (*POSITION_EDGES, None), strict=True)]
        return self.sliced(labels, np.searchsorted(POSITION_EDGES, self.position, side="right"))

    def by_learner_probability(self) -> tuple[Slice, ...]:
        """The gap by how probable the learner finds the token."""
        edges = (0.0, *PROBABILITY_EDGES, 1.0)
        labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        return self.sliced(labels, np.searchsorted(PROBABILITY_EDGES, np.exp(self.learner_logps), side="right"))

    def by_entropy(self) -> tuple[Slice, ...]:
        """The gap by how undecided the learner is, in nats; empty where that is not known."""
        if self.entropy is None:
            return ()
        edges = (0.0, *ENTROPY_EDGES)
        labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)] + [f"{edges[-1]:g} and more"]
        return self.sliced(labels, np.searchsorted(ENTROPY_EDGES, self.entropy, side="right"))

    def sliced(self, labels: Sequence[str], bins: NDArray[np.int_]) -> tuple[Slice, ...]:
        """The gap of the tokens of each bin; `bins` int [num_tokens] indexes `labels`. Bins without a token are left out."""
        counts, abs_dp, abs_log_ratio = (
            binned_sums(values, self.sequence, bins, self.num_sequences, len(labels))
            for values in (np.ones(self.num_tokens), self.abs_dp, np.abs(self.log_ratio))
        )
        there = np.flatnonzero(counts.sum(0))
        counts = counts[:, there]
        both = (ratios(sums[:, there], counts) if len(there) else [] for sums in (abs_dp, abs_log_ratio))
        return tuple(Slice(labels[i], int(count), *two) for i, count, *two in zip(there, counts.sum(0), *both, strict=True))


@dataclass(frozen=True, slots=True)
class Slice:
    """The gap on some of the tokens: mean abs(dp), and mean abs(d) in nats. Intervals over the sequences that have such a token."""

    label: str
    num_tokens: int
    abs_dp: Measure
    abs_log_ratio: Measure


@dataclass(frozen=True, slots=True)
class LearnerNoise:
    """The learner's own rounding beside the gap; 95 % intervals over sequences.

    `abs_dp`: mean abs(p_learner - p_fp32), p_fp32 by the same weights in float32; 0 for a learner that computes in it.
    `gap_to_fp32`: mean abs(p_fp32 - p_engine). `explained`: the gap minus that, token by token; at most `abs_dp`, and negative where the
    engine rounds as the learner does.
    """

    abs_dp: Measure
    gap_to_fp32: Measure
    explained: Measure


def _joined(parts: Iterable[NDArray[Any]], dtype: type[Any]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype)


def _span(begin: int, end: int | None) -> str:
    return f"{begin} and later" if end is None else str(begin) if end == begin + 1 else f"{begin} to {end - 1}"


def _mean_of(values: Callable[[Gap], Floats]) -> Callable[[Gap, float | None], Measure]:
    def of(gap: Gap, confidence: float | None) -> Measure:
        with np.errstate(over="ignore"):
            return gap.mean_of(values(gap), confidence)

    return of


def _effective_share(gap: Gap, confidence: float | None) -> Measure:
    if not gap.num_tokens:
        return Measure(None, None, None, 0)
    weights = np.exp(gap.log_ratio - gap.log_ratio.max())  # the share does not depend on their scale
    sums = [np.bincount(gap.sequence, values, gap.num_sequences) for values in (weights, weights**2, np.ones_like(weights))]
    return measure(lambda s: s[..., 0] ** 2 / (s[..., 1] * s[..., 2]), np.stack(sums, axis=1), confidence)


def _first_divergences(gap: Gap) -> Floats:
    """Position of the first disagreement of each sequence, float64 [num_sequences]; infinite where there is none."""
    first = np.full(gap.num_sequences, np.inf)
    np.minimum.at(first, gap.sequence[~gap.greedy_agrees], gap.position[~gap.greedy_agrees].astype(float))
    return first


def _no_divergence_share(gap: Gap, confidence: float | None) -> Measure:
    first = _first_divergences(gap)
    return mean(np.isinf(first).astype(float), np.arange(len(first)), len(first), confidence)


def _first_divergence_p50(gap: Gap, confidence: float | None) -> Measure:
    first = _first_divergences(gap)
    first = first[np.isfinite(first)]
    return quantile(first, np.arange(len(first)), len(first), 0.5, confidence)


def _nonfinite_share(gap: Gap, confidence: float | None) -> Measure:
    return measure(ratio, np.stack([gap.nonfinite, gap.scored], axis=1).astype(float), confidence)


MEASURES: Mapping[str, Callable[[Gap, float | None], Measure]] = {
    "abs_dp_mean": _mean_of(lambda gap: gap.abs_dp),
    "abs_dp_p50": lambda gap, confidence: quantile(gap.abs_dp, gap.sequence, gap.num_sequences, 0.5, confidence),
    "abs_dp_p99": lambda gap, confidence: quantile(gap.abs_dp, gap.sequence, gap.num_sequences, 0.99, confidence),
    "abs_dp_max": lambda gap, confidence: largest(gap.abs_dp, gap.sequence, gap.num_sequences, confidence),
    "kl_k1": _mean_of(lambda gap: -gap.log_ratio),
    "kl_k3": _mean_of(lambda gap: np.expm1(gap.log_ratio) - gap.log_ratio),
    "chi2": _mean_of(lambda gap: np.expm1(gap.log_ratio) ** 2),
    "effective_share": _effective_share,
    "greedy_agreement": _mean_of(lambda gap: gap.greedy_agrees.astype(float)),
    "no_divergence_share": _no_divergence_share,
    "first_divergence_p50": _first_divergence_p50,
    "nonfinite_share": _nonfinite_share,
}
"""Name -> (gap, confidence) -> measure; formulas at the top of this file."""
