"""How far the engine's probabilities are from the learner's, on the tokens that were sampled.

Two causes, never mixed in one number: the *engine gap* (two machines, one weight version) and the *staleness gap*
(one machine, two weight versions). All functions take log-probs in nats at one temperature, any equal shapes.

With d = learner_logp - engine_logp, pi the learner, mu the engine, and tokens drawn from mu (the two arguments may also be
the learner now and the learner old: the tokens were not drawn from either then, and the measures are distances only):

| measure | per token | its mean estimates | variance |
| --- | --- | --- | --- |
| abs_dp | abs(pi(y) - mu(y)) | the paper's delta, no divergence; in [0, 1] | low, bounded |
| abs_log_ratio | abs(d) | mean size of the log ratio | rare tokens weigh most |
| k1 | -d | KL(mu || pi), unbiased | highest of k1 to k3; of either sign |
| k2 | d^2 / 2 | KL(mu || pi), biased by a third-order term | low |
| k3 | exp(d) - 1 - d | KL(mu || pi), unbiased, never negative | low for small d, heavy-tailed for d >> 0 |
| chi2 | (exp(d) - 1)^2 | chi^2(pi || mu) = Var_mu(pi / mu), unbiased | heavy-tailed: the ratio squared |

Sources: abs_dp: arXiv 2606.08779; k1, k2, k3: Schulman 2020, "Approximating KL divergence",
http://joschu.net/blog/kl-approx.html with q = mu, p = pi; chi2 is the variance of the importance weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from hetero_rl.algorithm.segments import Segments

Measure = Literal["abs_dp", "abs_log_ratio", "k1", "k2", "k3", "chi2"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Aggregation = Literal["token_mean", "sequence_mean", "max"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


def abs_dp(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """abs(p_learner(y) - p_engine(y)) of each sampled token y, in [0, 1]. The paper's delta_t (arXiv 2606.08779)."""
    return (learner_logp.exp() - engine_logp.exp()).abs()


def abs_log_ratio(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """abs(log p_learner(y) - log p_engine(y)) of each sampled token, nats."""
    return (learner_logp - engine_logp).abs()


def k1(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """Per-token k1 estimate of KL(engine || learner), nats: -d. Unbiased, of either sign."""
    return engine_logp - learner_logp


def k2(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """Per-token k2 estimate of KL(engine || learner), nats: d^2 / 2. Biased by a term of third order in d."""
    return (learner_logp - engine_logp) ** 2 / 2


def k3(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(engine || learner), nats: exp(d) - 1 - d with d = learner_logp - engine_logp.

    Unbiased under the engine's sampling and never negative (Schulman, "Approximating KL divergence", 2020).
    """
    log_ratio = learner_logp - engine_logp
    return torch.expm1(log_ratio) - log_ratio


def chi2(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """Per-token estimate of chi^2(learner || engine): (exp(d) - 1)^2.

    The mean is that of the usual exp(d)^2 - 1, because E_engine[exp(d)] = 1, and no term is negative.
    """
    return torch.expm1(learner_logp - engine_logp) ** 2


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "abs_dp": abs_dp,
    "abs_log_ratio": abs_log_ratio,
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "chi2": chi2,
}


def discrepancy(measure: Measure, learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """The measure of that name, per token, in the shape of the inputs and with their gradient.

    Raises:
        ValueError: an unknown measure.
    """
    if measure not in _FUNCTIONS:
        raise ValueError(f"unknown discrepancy measure {measure!r}; known are {', '.join(MEASURES)}")
    return _FUNCTIONS[measure](learner_logp, engine_logp)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` holds; 0 when it holds nowhere. Values outside the mask may be NaN."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True, slots=True)
class MeasureSums:
    """One measure over one part of a batch; parts of whole responses add, so that no aggregate depends on how it was cut."""

    token_total: float = 0.0
    num_tokens: int = 0
    response_total: float = 0.0
    """Sum over responses of the mean over their counted tokens."""
    num_responses: int = 0
    """Responses with a counted token."""
    largest: float = float("-inf")

    @classmethod
    def of(cls, values: Tensor, mask: Tensor, segments: Segments) -> MeasureSums:
        """Of `values` float [num_tokens] where `mask` bool [num_tokens] holds; values elsewhere may be NaN."""
        counts = segments.sum(torch.ones_like(values), mask)
        return cls(
            token_total=float(torch.where(mask, values, 0.0).sum()),
            num_tokens=int(mask.sum()),
            response_total=float(segments.mean(values, mask).sum()),
            num_responses=int((counts > 0).sum()),
            largest=float(values[mask].max()) if bool(mask.any()) else float("-inf"),
        )

    def __add__(self, other: MeasureSums) -> MeasureSums:
        """Both parts together."""
        return MeasureSums(
            self.token_total + other.token_total,
            self.num_tokens + other.num_tokens,
            self.response_total + other.response_total,
            self.num_responses + other.num_responses,
            max(self.largest, other.largest),
        )

    def value(self, aggregation: Aggregation) -> float:
        """Mean over tokens, mean over responses of their means (short ones count as much as long ones), or the largest token.

        NaN when no token was counted. Raises `ValueError` for an unknown aggregation.
        """
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"unknown aggregation {aggregation!r}; known are {', '.join(AGGREGATIONS)}")
        if self.num_tokens == 0:
            return float("nan")
        if aggregation == "max":
            return self.largest
        return self.token_total / self.num_tokens if aggregation == "token_mean" else self.response_total / self.num_responses


@dataclass(frozen=True, slots=True)
class Sums:
    """Base of sums over the tokens of one part of a batch; they add field by field, so that means do not depend on how it was cut."""

    def __add__(self, other: Self) -> Self:
        """Sums over both parts."""
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class GapSums(Sums):
    """The two parts of the gap and the k3 KL, summed over the tokens with a finite engine log-prob; and the numbers of tokens."""

    engine_gap: float = 0.0
    staleness_gap: float = 0.0
    kl_k3: float = 0.0
    num_tokens: int = 0
    num_nonfinite: int = 0

    def mean(self, total: float) -> float:
        """`total` per counted token; NaN when none was counted."""
        return total / self.num_tokens if self.num_tokens else float("nan")


def split_gap(learner_logp: Tensor, learner_old_logp: Tensor, engine_logp: Tensor, measure: Measure = "abs_dp") -> GapSums:
    """Split the gap between the learner now and the engine then into its two parts.

    Args:
        learner_logp: The learner's log-probs under its weights of now.
        learner_old_logp: The learner's log-probs under the weights that the engine served when it sampled.
        engine_logp: The engine's log-probs; non-finite ones leave mask and denominator and are counted.
        measure: What both gaps are measured in.

    Returns:
        engine_gap = sum measure(learner_old, engine), staleness_gap = sum measure(learner, learner_old), and the k3 KL of the
        engine part, over the tokens with a finite engine log-prob.
    """
    finite = torch.isfinite(engine_logp)
    safe_engine = torch.where(finite, engine_logp, 0.0)

    def total(values: Tensor) -> float:
        return float(torch.where(finite, values, 0.0).sum())

    return GapSums(
        engine_gap=total(discrepancy(measure, learner_old_logp, safe_engine)),
        staleness_gap=total(discrepancy(measure, learner_logp, learner_old_logp)),
        kl_k3=total(k3(learner_old_logp, safe_engine)),
        num_tokens=int(finite.sum()),
        num_nonfinite=int((~finite).sum()),
    )
