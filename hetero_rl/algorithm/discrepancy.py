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
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetero_rl.algorithm.kinds import MEASURES, Aggregation, Measure
from hetero_rl.algorithm.segments import Segments


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


def token_gap(learner_logp: NDArray[np.float32], engine_logp: NDArray[np.float32], measure: Measure = "abs_dp") -> NDArray[np.float32]:
    """The measure of that name per token, float32; NaN where the engine gave no finite log-prob."""
    finite = np.isfinite(engine_logp)
    safe = (torch.from_numpy(np.where(finite, logp, 0.0).astype(np.float32)) for logp in (learner_logp, engine_logp))
    gap: NDArray[np.float32] = np.where(finite, discrepancy(measure, *safe).numpy(), np.float32(np.nan))
    return gap


@dataclass(frozen=True, slots=True)
class Sums:
    """Base of sums over the tokens of one part of a batch; they add field by field, so that means do not depend on how it was cut."""

    def __add__(self, other: Self) -> Self:
        """Sums over both parts."""
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class GapSums(Sums):
    """The two parts of the gap, and the k3 KL, summed over the tokens with a finite engine log-prob; and the numbers of tokens."""

    engine_gap: float = 0.0
    staleness_gap: float = 0.0
    num_gaps: float = 0.0
    """What the two gaps are divided by: counted tokens, or responses with one where each counts as much as the other."""
    kl_k3: float = 0.0
    num_tokens: int = 0
    num_nonfinite: int = 0

    @property
    def mean_engine_gap(self) -> float:
        """What the constraint bounds; NaN when nothing was counted."""
        return self.engine_gap / self.num_gaps if self.num_gaps else float("nan")

    @property
    def mean_staleness_gap(self) -> float:
        """In the same measure, of the two weight versions."""
        return self.staleness_gap / self.num_gaps if self.num_gaps else float("nan")

    def mean(self, total: float) -> float:
        """`total` per counted token; NaN when none was counted."""
        return total / self.num_tokens if self.num_tokens else float("nan")


def split_gap(
    learner_logp: Tensor,
    learner_old_logp: Tensor,
    engine_logp: Tensor,
    segments: Segments,
    measure: Measure = "abs_dp",
    aggregation: Aggregation = "token",
) -> GapSums:
    """Split the gap between the learner now and the engine then into its two parts.

    Args:
        learner_logp: The learner's log-probs under its weights of now.
        learner_old_logp: The learner's log-probs under the weights that the engine served when it sampled.
        engine_logp: The engine's log-probs; non-finite ones leave mask and denominator and are counted.
        segments: The responses that the tokens belong to, whole ones.
        measure: What both gaps are measured in.
        aggregation: Whether each token counts as much as the next, or each response.

    Returns:
        engine_gap = sum measure(learner_old, engine), staleness_gap = sum measure(learner, learner_old), and the k3 KL of the
        engine part, over the tokens with a finite engine log-prob.
    """
    finite = torch.isfinite(engine_logp)
    safe_engine = torch.where(finite, engine_logp, 0.0)
    counts = segments.sum(torch.ones_like(engine_logp), finite)

    def total(values: Tensor) -> float:
        return float(torch.where(finite, values, 0.0).sum())

    def gap(values: Tensor) -> float:
        return total(values) if aggregation == "token" else float(segments.mean(values, finite).sum())

    return GapSums(
        engine_gap=gap(discrepancy(measure, learner_old_logp, safe_engine)),
        staleness_gap=gap(discrepancy(measure, learner_logp, learner_old_logp)),
        num_gaps=float(counts.sum() if aggregation == "token" else (counts > 0).sum()),
        kl_k3=total(k3(learner_old_logp, safe_engine)),
        num_tokens=int(finite.sum()),
        num_nonfinite=int((~finite).sum()),
    )
