"""The policy loss. Its ratio is always learner against learner: engine log-probs never enter the clip."""

from __future__ import annotations

from torch import Tensor


def ppo_clip_loss(
    learner_logp: Tensor, learner_old_logp: Tensor, advantage: Tensor, weight: Tensor | float, clip_low: float, clip_high: float
) -> Tensor:
    """Per-token clipped surrogate: -w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = p_learner / p_learner_old.

    Args:
        learner_logp: float32 [num_tokens], with gradient.
        learner_old_logp: float32 [num_tokens], the learner's own log-probs when the rollout was drawn; no gradient.
        advantage: float32 [num_tokens], the advantage of the token's response (or of the token).
        weight: float32 [num_tokens] or 1.0, importance weight of the engine correction; no gradient.
        clip_low: Lower clip range; 0.2 in PPO (arXiv 1707.06347, equation 7).
        clip_high: Upper clip range; larger than `clip_low` is DAPO's clip-higher (arXiv 2503.14476).

    Returns:
        float32 [num_tokens]; the caller sums over the batch and divides by the batch's token count.
    """
    ratio = (learner_logp - learner_old_logp.detach()).exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage
    return -weight * unclipped.minimum(clipped)


def clip_fraction(learner_logp: Tensor, learner_old_logp: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Per token: 1 where the clip stops the gradient, else 0."""
    ratio = (learner_logp - learner_old_logp).exp()
    return (((ratio > 1.0 + clip_high) & (advantage > 0)) | ((ratio < 1.0 - clip_low) & (advantage < 0))).float()
