"""The policy loss per token. Whose log-probs the ratio is taken against is part of each loss.

With r_t = p_learner(y_t) / p_anchor(y_t), A the advantage, w the weight of the engine correction, sg(.) without gradient:

| loss | per token | anchor | bias, variance |
| --- | --- | --- | --- |
| ppo_clip | -w min(r A, clip(r, 1 - low, 1 + high) A) | learner, old | no gradient where the clip binds |
| gspo | the same with s = sg(mean ratio of the response) r / sg(r) | learner, old | one clip for a response; low variance |
| cispo | -w sg(clip(r, 1 - low, 1 + high)) A log p_learner | learner, old | of the cut alone: every token keeps a gradient |
| dppo | -sg(min(r, 20)) A log p_learner where not (abs(dp) beyond the bound and moving away), else 0 | engine | of cut and mask |

In the first three the ratio is the learner against itself, so a coarse engine never clips. DPPO is anchored where the tokens were
drawn, as published: it takes engine gap and staleness as one, and no engine correction goes with it.

Sources: PPO, arXiv 1707.06347, equation 7; clip-higher: DAPO, arXiv 2503.14476. GSPO, arXiv 2507.18071 (GSPO-token, equation 13;
the geometric mean of the ratios). CISPO: MiniMax-M1, arXiv 2506.13585, equation 4. DPPO with the binary total variation: Qi
et al., arXiv 2602.04879, equations 11 to 13, with the cut of the importance weight of the authors' implementation.

Shapes: all float32 [num_tokens], nats; only `learner_logp` has a gradient. The caller sums over the batch and normalizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_rl.algorithm.kinds import POLICY_LOSSES, ClipRange, PolicyLoss
from hetero_rl.algorithm.segments import Segments

DPPO_RATIO_MAX = 20.0
"""Where the authors' implementation cuts the importance weight."""


def policy_loss(
    kind: PolicyLoss,
    learner_logp: Tensor,
    learner_old_logp: Tensor,
    engine_logp: Tensor,
    advantage: Tensor,
    weight: Tensor,
    mask: Tensor,
    segments: Segments,
    clip: ClipRange,
) -> tuple[Tensor, Tensor]:
    """The loss of each token by the module's table, and 1.0 where the bound stops its gradient, else 0.0.

    Args:
        kind: Row of the table.
        learner_logp: Under the weights of now, with gradient.
        learner_old_logp: Under the weights that the engine served when it sampled.
        engine_logp: The engine's; finite inside the mask.
        advantage: Of the token's response, or of the token.
        weight: Importance weight of the engine correction; `dppo` has its own and takes 1.
        mask: bool [num_tokens], tokens that count; `gspo` leaves the others out of a response's mean.
        segments: Which response each token belongs to; whole responses.
        clip: How far the ratio (`dppo`: the probability) may move.

    Returns:
        Two of float32 [num_tokens], the first with gradient; outside the mask they mean nothing.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in POLICY_LOSSES:
        raise ValueError(f"unknown policy loss {kind!r}; known are {', '.join(POLICY_LOSSES)}")
    if kind == "dppo":
        return _dppo(learner_logp, engine_logp, advantage, clip)
    log_ratio = learner_logp - learner_old_logp.detach()
    if kind == "gspo":
        mean = segments.spread(segments.mean(log_ratio.detach(), mask))
        log_ratio = mean + learner_logp - learner_logp.detach()
    ratio = log_ratio.exp()
    above, below = ratio.detach() > 1.0 + clip.high, ratio.detach() < 1.0 - clip.low
    if kind == "cispo":
        cut = ratio.detach().clamp(1.0 - clip.low, 1.0 + clip.high)
        return -weight * cut * advantage * learner_logp, (above | below).float()
    bounded = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    stopped = (above & (advantage > 0)) | (below & (advantage < 0))
    return -weight * (ratio * advantage).minimum(bounded * advantage), stopped.float()


def _dppo(learner_logp: Tensor, engine_logp: Tensor, advantage: Tensor, clip: ClipRange) -> tuple[Tensor, Tensor]:
    shift = learner_logp.detach().exp() - engine_logp.exp()
    stopped = ((shift > clip.high) & (advantage > 0)) | ((shift < -clip.low) & (advantage < 0))
    ratio = (learner_logp.detach() - engine_logp).exp().clamp(max=DPPO_RATIO_MAX)
    return torch.where(stopped, 0.0, -ratio * advantage * learner_logp), stopped.float()


def response_scales(lengths: list[int], normalization: str, max_length: int) -> list[float]:
    """By what the tokens of each response count, such that sum(scale * loss) / sum(lengths) is the normalized loss.

    `lengths`: counted tokens of each response of the step. `token`: the mean over tokens (DAPO): long responses weigh more.
    `sequence`: the mean over responses of their means (GRPO): a token of a long response weighs less. `dr`: the sum over tokens
    by the number of responses and `max_length`, the longest that may be sampled (Dr. GRPO): neither depends on the lengths.
    """
    total, num_responses = sum(lengths), sum(length > 0 for length in lengths)
    match normalization:
        case "token":
            return [1.0] * len(lengths)
        case "sequence":
            return [total / (num_responses * length) if length else 0.0 for length in lengths]
        case "dr":
            return [total / (num_responses * max_length) if length else 0.0 for length in lengths]
    raise ValueError(f"unknown normalization {normalization!r}; known are token, sequence, dr")
