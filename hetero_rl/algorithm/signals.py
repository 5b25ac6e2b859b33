"""How the constraint reaches the gradient: four signals, all scaled by the multiplier lambda.

With theta the learner's weights, pi the learner, mu the engine and mu_theta the learner run with straight-through
fake-quantized weights (its *twin*):

| signal | cost per token | gradient |
| --- | --- | --- |
| grey box (ours) | KL(mu_theta || pi_theta) | through the twin AND the learner |
| flatness | KL(pi_(theta + xi) || pi_theta), xi the rounding errors at random signs | through both |
| loss side (the paper's, arXiv 2606.08779) | abs(p_pi(y) - p_mu(y)) | through the learner; mu is a constant |
| advantage side (the paper's) | A_t - lambda abs(p_pi(y) - p_mu(y)) | none of its own; it reshapes the advantage |

The advantage side has four forms: the cost of each token or its mean over the response, as it is or less the mean over the
prompt's group, which like a baseline takes from every response what all of them pay.

Why the grey box is the default: on coarse grids the engine's weights follow the learner's, so pulling the learner towards
a constant mu moves mu as well and the gap does not fall. With both sides live the penalty is a descent direction.

Flatness asks for a policy that errors of the target's size cannot move, wherever on the grid the weights lie: pseudo
quantization noise (Defossez et al., arXiv 2104.09987) as a penalty. Its expectation over xi is half the errors' variance
times the trace of the Fisher matrix, to second order; one draw per update has the variance of a quadratic form in signs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hetero_rl.algorithm.discrepancy import abs_dp
from hetero_rl.algorithm.kinds import AdvantageForm, GreyBoxForm
from hetero_rl.algorithm.segments import Segments

TOP = 16
"""Tokens that `grey_box_top` tells apart."""


def grey_box_kl(twin_logp: Tensor, learner_logp: Tensor) -> Tensor:
    """KL(mu_theta || pi_theta) over the whole vocabulary, nats.

    Args:
        twin_logp: float32 [num_tokens, vocab], log-probs of the fake-quantized twin, temperature applied; with gradient.
        learner_logp: float32 [num_tokens, vocab], those of the learner; with gradient.

    Returns:
        float32 [num_tokens], never negative up to rounding.
    """
    return (twin_logp.exp() * (twin_logp - learner_logp)).sum(dim=-1)


def grey_box_top(twin_logp: Tensor, learner_logp: Tensor, count: int = TOP) -> Tensor:
    """KL(mu_theta || pi_theta) of the distributions over the twin's `count` most probable tokens and one that stands for the rest.

    Arguments and result as `grey_box_kl`, of which this is a lower bound (log-sum inequality); the gradient is that of the bound.
    """
    top = twin_logp.detach().topk(min(count, twin_logp.shape[-1]), dim=-1).indices
    twin_top, learner_top = twin_logp.gather(-1, top), learner_logp.gather(-1, top)
    # The rest as a difference from 1 loses its digits when it is small, and then counts for nothing.
    twin_rest, learner_rest = ((1.0 - logp.exp().sum(dim=-1)).clamp(min=1e-8) for logp in (twin_top, learner_top))
    return (twin_top.exp() * (twin_top - learner_top)).sum(dim=-1) + twin_rest * (twin_rest.log() - learner_rest.log())


def grey_box_sampled(twin_logp: Tensor, learner_logp: Tensor, targets: Tensor) -> Tensor:
    """abs(p_twin(y) - p_learner(y)) of the sampled tokens `targets` int64 [num_tokens], with the gradient of both sides.

    The constraint's own measure, but for the kernels; log-probs as in `grey_box_kl`. Its gradient has one size whatever the gap, and
    knows of the other tokens only by the normalization.
    """
    return abs_dp(*(logp.gather(-1, targets[:, None])[:, 0] for logp in (twin_logp, learner_logp)))


def grey_box_cost(form: GreyBoxForm, twin_logp: Tensor, learner_logp: Tensor, targets: Tensor) -> Tensor:
    """The cost of each token, float32 [num_tokens], in one of its forms: KL in nats, or abs(dp)."""
    match form:
        case "kl":
            return grey_box_kl(twin_logp, learner_logp)
        case "top":
            return grey_box_top(twin_logp, learner_logp)
        case "sampled":
            return grey_box_sampled(twin_logp, learner_logp, targets)


def loss_side_cost(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """abs(p_learner(y) - p_engine(y)) per token with the engine's probability held constant."""
    return abs_dp(learner_logp, engine_logp.detach())


def advantage_cost(form: AdvantageForm, old_logp: Tensor, engine_logp: Tensor, mask: Tensor, segments: Segments) -> Tensor:
    """abs(p_learner(y) - p_engine(y)) of each token, or the mean over its response; float [num_tokens], without gradient.

    `old_logp` is of the weights that the engine served; tokens outside `mask` bool [num_tokens] do not count.
    """
    cost = abs_dp(old_logp.detach(), engine_logp)
    return cost if form.startswith("token") else segments.spread(segments.mean(cost, mask))


def advantage_side(advantage: Tensor, cost: Tensor, group_cost: Tensor, multiplier: float) -> Tensor:
    """A_t - lambda * (cost_t - group_cost): `cost` of `advantage_cost`, `group_cost` its mean over the group or 0; per token."""
    return advantage - multiplier * (cost - group_cost)


def group_costs(form: AdvantageForm, costs: Sequence[NDArray[np.float32]], groups: Sequence[Hashable]) -> list[float]:
    """Mean cost of each response's group: over the group's tokens, or over its responses as the form counts.

    Args:
        form: One of the centred forms.
        costs: One array [num_tokens_i] of abs(dp) per response; NaN (no engine log-prob) is left out.
        groups: Which group each response belongs to.
    """
    totals: dict[Hashable, list[float]] = {}
    for cost, group in zip(costs, groups, strict=True):
        total, count = float(np.nansum(cost)), int(np.isfinite(cost).sum())
        if form == "response_centered" and count:
            total, count = total / count, 1
        sums = totals.setdefault(group, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + total, sums[1] + count
    return [totals[group][0] / max(totals[group][1], 1.0) for group in groups]
