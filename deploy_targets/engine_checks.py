"""Cheap questions to a running engine whose answers have to agree with each other, whatever the learner says.

    repeatable    asked again, in another order and one by one, the engine gives the same answers (prefix cache, batches)
    right_token   a most probable token has at least the probability 1 / vocabulary, and a token above one half is the most probable
    temperature   at twice the temperature the most probable tokens are less probable
    normalised    the probabilities of all tokens after a prompt sum to 1 (of large vocabularies: those of the learner's top-k to at most 1)
    sampled       `generate` says of the tokens it draws what `score` says of them, under the same weight_version

Two answers of one engine to the same question differ by the rounding of its kernels: 0.02 of mean abs(dp) is granted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deploy_targets.errors import EngineError, UsageError
from deploy_targets.probes import Probe, ProbeSet
from deploy_targets.protocols import Engine
from deploy_targets.types import Sampling, TokenScores, TokenSequence

NUM_SEQUENCES = 8
OWN_NOISE = 0.02
"""Mean abs(dp) of an engine to itself that kernels may cause."""
_ALL_TOKENS = 512
"""Vocabularies up to this size are summed as a whole."""
_CONTRADICTIONS = 0.01
_LEAST_FALL = 0.02
"""Of the variance p (1 - p) of most probable tokens, the least by which twice the temperature has to lower p in the mean."""


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """One question. `passed` is None where the engine cannot be asked; `cause` is what a failure means."""

    name: str
    passed: bool | None
    detail: str
    cause: str


CAUSES = {
    "right_token": "the engine returns log-probs of other tokens than those asked for",
    "temperature": "the engine ignores the temperature",
    "normalised": "the engine's log-probs are renormalised over a part of the vocabulary (top-p, top-k), or not normalised at all",
    "sampled": "the engine says of tokens it samples something else than when it scores them",
    "repeatable": "the engine's answers depend on what it was asked before or with (prefix cache, batches)",
}
_RENORMALISED = "the engine's log-probs of sampled tokens are renormalised over a part of the vocabulary (top-p, top-k)"


def check_engine(engine: Engine, probes: ProbeSet, max_tokens: int, stop_token_ids: tuple[int, ...]) -> tuple[EngineCheck, ...]:
    """Ask `engine` about some of `probes`, and for `max_tokens` at most in response to their prompts.

    To be called before anything else was scored: what a cache holds is then known.
    """
    step = max(1, len(probes.probes) // NUM_SEQUENCES)
    some = probes.probes[::step][:NUM_SEQUENCES]
    sequences = [probe.sequence for probe in some]
    scores = engine.score(sequences, probes.temperature)
    return (
        _repeatable(engine, sequences, scores),
        _right_token(sequences, scores, probes.vocab_size),
        _temperature(engine, sequences, scores),
        _normalised(engine, some[0], probes),
        _sampled(engine, some, probes, Sampling(max_tokens, probes.temperature, 1, stop_token_ids)),
    )


def _check(name: str, passed: bool | None, detail: str, cause: str | None = None) -> EngineCheck:
    return EngineCheck(name, passed, detail, cause or CAUSES[name])


def _right_token(sequences: Sequence[TokenSequence], scores: Sequence[TokenScores], vocab_size: int | None) -> EngineCheck:
    tokens = np.concatenate([np.array(sequence.tokens[sequence.prompt_len :]) for sequence in sequences])
    p, greedy = _probabilities(scores), np.concatenate([score.greedy_tokens for score in scores])
    finite = np.isfinite(p)
    is_greedy = tokens == greedy
    least = 1 / vocab_size if vocab_size else 0.0
    wrong = finite & ((is_greedy & (p < 0.99 * least)) | (~is_greedy & (p > 0.51)))
    share = float(wrong.sum() / max(1, finite.sum()))
    return _check(
        "right_token", share <= _CONTRADICTIONS, f"{share:.1%} of {int(finite.sum())} log-probs contradict the most probable token"
    )


def _temperature(engine: Engine, sequences: Sequence[TokenSequence], scores: Sequence[TokenScores]) -> EngineCheck:
    temperature = scores[0].temperature
    try:
        hotter = engine.score(sequences, 2 * temperature)
    except (UsageError, EngineError) as error:  # a server may not give what another temperature than its own needs
        return _check("temperature", None, f"not asked: {error}")
    tokens = np.concatenate([np.array(sequence.tokens[sequence.prompt_len :]) for sequence in sequences])
    greedy = np.concatenate([score.greedy_tokens for score in scores])
    p, p_hot = _probabilities(scores), _probabilities(hotter)
    asked = (tokens == greedy) & np.isfinite(p) & np.isfinite(p_hot)
    spread = float((p * (1 - p))[asked].mean()) if asked.any() else 0.0
    if spread < 1e-4:
        return _check("temperature", None, "not asked: the model is certain of all these tokens")
    fall = float((p - p_hot)[asked].mean())
    lost = f"the {int(asked.sum())} most probable tokens lose {fall:.3f} of probability in the mean"
    detail = f"from {temperature:g} to {2 * temperature:g} {lost}"
    return _check("temperature", fall > _LEAST_FALL * spread, detail)


def _normalised(engine: Engine, probe: Probe, probes: ProbeSet) -> EngineCheck:
    prompt = probe.sequence.tokens[: probe.sequence.prompt_len]
    whole = probes.vocab_size is not None and probes.vocab_size <= _ALL_TOKENS
    if whole:
        assert probes.vocab_size is not None
        candidates = list(range(probes.vocab_size))
    elif probe.details is not None:
        candidates = probe.details.top_ids[0].tolist()
    else:
        return _check("normalised", None, "not asked: the probes name no candidates")
    p = _probabilities(engine.score([TokenSequence((*prompt, token), len(prompt)) for token in candidates], probes.temperature))
    num_cut, total = int((~np.isfinite(p) | (p == 0)).sum()), float(np.nansum(p))
    detail = f"{len(candidates)} tokens after one prompt sum to {total:.4f}, {num_cut} of them without a probability"
    return _check("normalised", num_cut == 0 and total < 1 + OWN_NOISE and (not whole or total > 1 - OWN_NOISE), detail)


def _sampled(engine: Engine, some: Sequence[Probe], probes: ProbeSet, sampling: Sampling) -> EngineCheck:
    prompts = [probe.sequence.tokens[: probe.sequence.prompt_len] for probe in some]
    temperature = sampling.temperature
    try:
        generations = engine.generate(prompts, sampling)
    except UsageError:  # a running server gives greedy responses only, with log-probs at temperature 1
        generations, temperature = engine.generate(prompts, replace(sampling, temperature=0.0)), 1.0
    drawn = [generation for generation in generations if len(generation.tokens)]
    if not drawn:
        return _check("sampled", None, "not asked: the engine drew no token")
    versions = {generation.weight_version for generation in drawn}
    if versions != {probes.weight_version}:
        return _check("sampled", False, f"responses are of weight_version {sorted(versions)}, the artifact is {probes.weight_version}")
    scores = engine.score([generation.sequence for generation in drawn], temperature)
    said = np.exp(np.concatenate([generation.logps for generation in drawn]).astype(np.float64))
    p = _probabilities(scores)
    finite = np.isfinite(said) & np.isfinite(p)
    if not finite.any():
        return _check("sampled", False, "no log-prob of a sampled token is finite")
    distance = float(np.abs(said - p)[finite].mean())
    higher = float((said > p)[finite].mean())
    detail = f"mean abs(dp) {distance:.4f} between generating and scoring {int(finite.sum())} tokens; generation says more for {higher:.0%}"
    return _check("sampled", distance <= OWN_NOISE, detail, _RENORMALISED if higher > 0.9 else None)


def _repeatable(engine: Engine, sequences: Sequence[TokenSequence], scores: Sequence[TokenScores]) -> EngineCheck:
    again = engine.score(sequences[::-1], scores[0].temperature)[::-1]
    alone = [engine.score([sequence], scores[0].temperature)[0] for sequence in sequences[: NUM_SEQUENCES // 2]]
    distances = {"again": list(_distances(scores, again)), "one by one": list(_distances(scores, alone))}
    means = {name: float(np.mean(values)) if values else math.nan for name, values in distances.items()}
    detail = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
    return _check("repeatable", all(not value > OWN_NOISE for value in means.values()), f"mean abs(dp) to the first answers: {detail}")


def _distances(first: Sequence[TokenScores], second: Sequence[TokenScores]) -> Iterator[float]:
    for one, other in zip(first, second, strict=False):
        if len(one.logps) != len(other.logps):
            raise EngineError(f"the engine scored {len(other.logps)} tokens of {len(one.logps)}")
        p, q = _probabilities([one]), _probabilities([other])
        yield from np.abs(p - q)[np.isfinite(p) & np.isfinite(q)].tolist()
        yield from [1.0] * int((np.isfinite(p) != np.isfinite(q)).sum())


def _probabilities(scores: Sequence[TokenScores]) -> NDArray[np.float64]:
    """NaN where the log-prob is not finite."""
    logps = np.concatenate([score.logps for score in scores]).astype(np.float64)
    return np.where(np.isfinite(logps), np.exp(logps), np.nan)
