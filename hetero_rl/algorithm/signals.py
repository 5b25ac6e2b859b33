"""How the constraint reaches the gradient: three signals, all scaled by the multiplier lambda.

With theta the learner's weights, pi the learner, mu the engine and mu_theta the learner run with straight-through
fake-quantized weights (its *twin*):

| signal | cost per token | gradient |
| --- | --- | --- |
| grey box (ours) | KL(mu_theta || pi_theta) | through the twin AND the learner |
| loss side (the paper's, arXiv 2606.08779) | abs(p_pi(y) - p_mu(y)) | through the learner; mu is a constant |
| advantage side (the paper's) | A_t - lambda abs(p_pi(y) - p_mu(y)) | none of its own; it reshapes the advantage |

Why the grey box is the default: on coarse grids the engine's weights follow the learner's, so pulling the learner towards
a constant mu moves mu as well and the gap does not fall. With both sides live the penalty is a descent direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_rl.algorithm.discrepancy import abs_dp


def grey_box_kl(twin_logits: Tensor, learner_logits: Tensor) -> Tensor:
    """KL(mu_theta || pi_theta) over the whole vocabulary, nats.

    Args:
        twin_logits: float32 [num_tokens, vocab], of the fake-quantized twin, temperature applied; with gradient.
        learner_logits: float32 [num_tokens, vocab], of the learner, temperature applied; with gradient.

    Returns:
        float32 [num_tokens], never negative up to rounding.
    """
    twin_logp = torch.log_softmax(twin_logits, dim=-1)
    learner_logp = torch.log_softmax(learner_logits, dim=-1)
    return (twin_logp.exp() * (twin_logp - learner_logp)).sum(dim=-1)


def loss_side_cost(learner_logp: Tensor, engine_logp: Tensor) -> Tensor:
    """abs(p_learner(y) - p_engine(y)) per token with the engine's probability held constant."""
    return abs_dp(learner_logp, engine_logp.detach())


def advantage_side(advantage: Tensor, learner_logp: Tensor, engine_logp: Tensor, multiplier: float) -> Tensor:
    """A_t - lambda * abs(p_learner(y_t) - p_engine(y_t)) per token, without gradient."""
    return advantage - multiplier * abs_dp(learner_logp.detach(), engine_logp)
