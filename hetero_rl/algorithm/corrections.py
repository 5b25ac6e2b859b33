"""Importance weights against the engine's distribution; apart from the staleness ratio, which the policy loss clips."""

from __future__ import annotations

from torch import Tensor


def tis_weights(learner_old_logp: Tensor, engine_logp: Tensor, cap: float) -> Tensor:
    """Token-level truncated importance sampling: min(p_learner_old(y) / p_engine(y), cap), without gradient.

    Both log-probs belong to the weight version that sampled, so the weight corrects the engine gap alone. Right when the
    high-precision weights are what ships; when the quantized copy ships it aims at the wrong policy.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; Flash-RL.
    """
    return (learner_old_logp - engine_logp).exp().clamp(max=cap).detach()
