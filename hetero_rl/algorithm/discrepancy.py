"""How far the engine's probabilities are from the learner's, on the tokens that were sampled.

Two causes, never mixed in one number: the *engine gap* (two machines, one weight version) and the *staleness gap*
(one machine, two weight versions). All functions take log-probs in nats at one temperature, any equal shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def abs_dp(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """abs(p_learner(y) - p_engine(y)) of each sampled token y, in [0, 1]. The paper's delta_t (arXiv 2606.08779)."""
    return (learner_logp.exp() - engine_logp.exp()).abs()


def k3(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(engine || learner), nats: exp(d) - 1 - d with d = learner_logp - engine_logp.

    Unbiased under the engine's sampling and never negative (Schulman, "Approximating KL divergence", 2020).
    """
    log_ratio = learner_logp - engine_logp
    return torch.expm1(log_ratio) - log_ratio


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` holds; 0 when it holds nowhere. Values outside the mask may be NaN."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True, slots=True)
class GapSums:
    """Sums over the tokens of one part of a batch; they add, so that means do not depend on how it was cut."""

    engine_gap: float = 0.0
    staleness_gap: float = 0.0
    kl_k3: float = 0.0
    num_tokens: int = 0
    num_nonfinite: int = 0

    def __add__(self, other: GapSums) -> GapSums:
        """Sums over both parts."""
        return GapSums(
            self.engine_gap + other.engine_gap,
            self.staleness_gap + other.staleness_gap,
            self.kl_k3 + other.kl_k3,
            self.num_tokens + other.num_tokens,
            self.num_nonfinite + other.num_nonfinite,
        )

    def mean(self, total: float) -> float:
        """`total` per counted token; NaN when none was counted."""
        return total / self.num_tokens if self.num_tokens else float("nan")


def split_gap(learner_logp: Tensor, learner_old_logp: Tensor, engine_logp: Tensor) -> GapSums:
    """Split the gap between the learner now and the engine then into its two parts.

    Args:
        learner_logp: The learner's log-probs under its weights of now.
        learner_old_logp: The learner's log-probs under the weights that the engine served when it sampled.
        engine_logp: The engine's log-probs; non-finite ones leave mask and denominator and are counted.

    Returns:
        engine_gap = sum abs_dp(learner_old, engine), staleness_gap = sum abs_dp(learner, learner_old), and the k3 KL of the
        engine part, over the tokens with a finite engine log-prob.
    """
    finite = torch.isfinite(engine_logp)
    safe_engine = torch.where(finite, engine_logp, 0.0)

    def total(values: Tensor) -> float:
        return float(torch.where(finite, values, 0.0).sum())

    return GapSums(
        engine_gap=total(abs_dp(learner_old_logp, safe_engine)),
        staleness_gap=total(abs_dp(learner_logp, learner_old_logp)),
        kl_k3=total(k3(learner_old_logp, safe_engine)),
        num_tokens=int(finite.sum()),
        num_nonfinite=int((~finite).sum()),
    )
