"""Importance weights against the engine's distribution; apart from the staleness ratio, which the policy loss clips.

With rho_t = p_learner_old(y_t) / p_engine(y_t), both of the weight version that sampled, T the tokens of a response and
C_low, C_high the bounds:

| kind | weight of token t | bias towards E_learner | variance |
| --- | --- | --- | --- |
| none | 1 | the whole engine gap | none added |
| tis | min(rho_t, C_high) | of the cut, and of the prefix: only the token is corrected | at most C_high^2 |
| tis_sequence | min(prod_T rho, C_high) | of the cut alone | grows with the length of the response up to C_high^2 |
| mis, icepop | rho_t inside [C_low, C_high], else 0 | of the dropped tokens, and of the prefix | at most C_high^2 |
| mis_sequence | prod_T rho inside the bounds, else 0 | of the dropped responses alone | as tis_sequence, and fewer responses |
| mis_geometric | (prod_T rho)^(1/len T) inside, else 0 | of the dropped responses and of the root | lowest of the sequence weights |

All of them aim at the high-precision weights. When the quantized copy is what ships, `none` aims right and they do not.

A dropped token stays in the loss's denominator: sum(w f) / num_tokens is the estimate of E_engine[w f] that the table
speaks of. Dividing by the kept tokens instead rescales the step by 1 / (share kept).

Sources: TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (token);
Liu, Li et al. 2025, "When Speed Kills Stability", https://richardli.xyz/rl-collapse (sequence TIS, MIS and the geometric
mean); masking whole responses is also Li, Liu et al., arXiv 2512.23075. IcePop: arXiv 2510.18855. Score centering: Marek
and Ryabinin, arXiv 2609.20807.

Shapes: log-probs are float [num_tokens], nats, the responses of a batch one after the other; `mask` is bool [num_tokens].
Log-probs outside the mask may be NaN or infinite; the weight there is 0. No weight has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_rl.algorithm.kinds import CENTERED, CORRECTIONS, DEFAULT_BOUNDS, Bounds, Centered, Correction
from hetero_rl.algorithm.segments import Segments


def correction_weights(
    kind: Correction,
    learner_old_logp: Tensor,
    engine_logp: Tensor,
    mask: Tensor,
    segments: Segments,
    bounds: Bounds | None = None,
) -> Tensor:
    """The weight of each token by the module's table.

    Args:
        kind: Row of the table.
        learner_old_logp: float [num_tokens].
        engine_logp: float [num_tokens].
        mask: bool [num_tokens], tokens with a finite engine log-prob. Masked tokens are left out of products and means: the
            ratio of a response is then that of its known tokens.
        segments: Which response each token belongs to; whole responses, not pieces of them.
        bounds: Of the ratio that `kind` looks at; by default `DEFAULT_BOUNDS[kind]`.

    Returns:
        float [num_tokens], without gradient, 0 outside the mask.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in CORRECTIONS:
        raise ValueError(f"unknown engine correction {kind!r}; known are {', '.join(CORRECTIONS)}")
    log_ratio = torch.where(mask, learner_old_logp - engine_logp, 0.0).detach()
    low, high = bounds or DEFAULT_BOUNDS[kind]
    match kind:
        case "none":
            weights = torch.ones_like(log_ratio)
        case "tis":
            weights = log_ratio.exp().clamp(max=high)
        case "tis_sequence":
            weights = segments.spread(segments.sum(log_ratio, mask)).exp().clamp(max=high)
        case "mis" | "icepop":
            weights = _inside(log_ratio.exp(), low, high)
        case "mis_sequence":
            weights = _inside(segments.spread(segments.sum(log_ratio, mask)).exp(), low, high)
        case "mis_geometric":
            weights = _inside(segments.spread(segments.mean(log_ratio, mask)).exp(), low, high)
    return torch.where(mask, weights, 0.0)


def effective_share(weights: float, squared_weights: float, num_tokens: int) -> float:
    """Effective sample size per token: (sum w)^2 / (num_tokens * sum w^2), in [0, 1].

    1 for equal weights; 0 when every token was dropped, which a run should not pass over in silence; NaN for no tokens.
    Source: Kong 1992, "A note on importance sampling using standardized weights".
    """
    if num_tokens == 0:
        return float("nan")
    return weights**2 / (num_tokens * squared_weights) if squared_weights else 0.0


def mean_score(learner_logp: Tensor, engine_logp: Tensor, kind: Centered = "none", bounds: Bounds | None = None) -> Tensor:
    """What, times the advantage and added to each token's policy loss, takes the engine's drift out of its gradient.

    At a prefix with engine q and learner p, the gradient of -A f(p_y / q_y) log p_y under y ~ q has the mean
    -E_q[A] sum_v q_v f_v grad log p_v - Cov_q(A, f grad log p). The first part says nothing about the reward: it pulls the
    learner to the engine, whose next weights it is. Times A, the term

        sum_v sg(q_v f(p_v / q_v)) log p_v

    cancels it. Bias: the covariance that is left is still one under q, not under p. Variance: a control variate's, since the
    mean is computed over the vocabulary and not sampled. Where p = q the term has no gradient.

    Args:
        learner_logp: float [num_tokens, vocab], log-probs of the learner, temperature applied, with gradient.
        engine_logp: float [num_tokens, vocab], log-probs over the whole vocabulary of the engine, or of its twin; no
            gradient. -inf is probability 0.
        kind: The weight f that the tokens of the loss carry; sequence weights have no value at tokens that were not drawn.
        bounds: Of f; by default `DEFAULT_BOUNDS[kind]`.

    Returns:
        float [num_tokens], with the gradient of the learner's log-probs.

    Raises:
        ValueError: a kind that is not one of a single token.

    Source: Marek and Ryabinin, arXiv 2609.20807, equation 3 (drift and signal) and appendix A.2 (f).
    """
    if kind not in CENTERED:
        raise ValueError(f"score centering is defined for the weights {', '.join(CENTERED)}, not for {kind!r}")
    coefficients = _weighted_probs(learner_logp.detach(), engine_logp.detach(), kind, bounds or DEFAULT_BOUNDS[kind])
    used = coefficients > 0
    # Twice: 0 * -inf is NaN going forward, and the gradient of an unused product is 0 * NaN coming back.
    coefficients = torch.where(used, coefficients, 0.0)
    return torch.where(used, coefficients * learner_logp, 0.0).sum(dim=-1)


def _weighted_probs(learner_logp: Tensor, engine_logp: Tensor, kind: Centered, bounds: Bounds) -> Tensor:
    """The vocabulary's q f(p / q), without a quotient of two small numbers."""
    learner, engine = learner_logp.exp(), engine_logp.exp()
    low, high = bounds
    match kind:
        case "none":
            return engine
        case "tis":
            return learner.minimum(high * engine)
        case "mis" | "icepop":
            return torch.where((learner >= low * engine) & (learner <= high * engine), learner, 0.0)


def _inside(weights: Tensor, low: float, high: float) -> Tensor:
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)
