"""How much better a response was than its siblings.

With r the rewards of one problem's responses, n their number, and `batch` all the responses of a step:

| kind | advantage | baseline's bias, variance |
| --- | --- | --- |
| grpo | (r - mean) / (std + eps) | scaled by (n - 1) / (n std): problems that are nearly always or never solved weigh more |
| dr_grpo | r - mean | scaled by (n - 1) / n, alike for all problems |
| rloo | r - mean of the others = n / (n - 1) (r - mean) | none |
| reinforce_pp | (r - mean of batch) / std of batch | none but the scale; the difficulty of a problem stays in as variance |
| reinforce_pp_baseline | (r - mean) / std over the batch of (r - mean) | as dr_grpo; the scale is the batch's |

Sources: GRPO: Shao et al., arXiv 2402.03300, section 4.1.2. Dr. GRPO: Liu et al., arXiv 2503.20783. RLOO: Kool et al. 2019, Ahmadian
et al., arXiv 2402.14740. REINFORCE++: Hu et al., arXiv 2501.03262. The standard deviation is the unbiased one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_rl.algorithm.kinds import ADVANTAGES, AdvantageKind

EPS = 1e-6


def advantages(kind: AdvantageKind, rewards: Tensor) -> Tensor:
    """The advantage of each response by the module's table.

    Args:
        kind: Row of the table.
        rewards: float32 [num_groups, group_size], one group per problem; NaN marks a response without a reward (dropped).

    Returns:
        float32 [num_groups, group_size]; 0 for dropped responses, and where all rewards that it is held against are equal.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"unknown advantage {kind!r}; known are {', '.join(ADVANTAGES)}")
    valid = torch.isfinite(rewards)
    if kind == "reinforce_pp":
        return _standardized(_centered(rewards.reshape(1, -1), valid.reshape(1, -1)), valid.reshape(1, -1)).reshape(rewards.shape)
    centered = _centered(rewards, valid)
    match kind:
        case "grpo":
            return _standardized(centered, valid)
        case "dr_grpo":
            return centered
        case "rloo":
            count = valid.sum(dim=1, keepdim=True)
            return centered * count / (count - 1).clamp(min=1)
        case "reinforce_pp_baseline":
            return _standardized(centered.reshape(1, -1), valid.reshape(1, -1)).reshape(rewards.shape)


def _centered(rewards: Tensor, valid: Tensor) -> Tensor:
    """Less the mean of the row; 0 where not `valid`, and in rows whose rewards are all equal, where the difference is rounding."""
    filled = torch.where(valid, rewards, 0.0)
    mean = filled.sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    centered = torch.where(valid, filled - mean, 0.0)
    return torch.where(centered.abs().amax(dim=1, keepdim=True) > EPS, centered, 0.0)


def _standardized(centered: Tensor, valid: Tensor) -> Tensor:
    """Divided by the standard deviation of the row's `valid` entries, whose mean is 0."""
    variance = (centered**2).sum(dim=1, keepdim=True) / (valid.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return centered / (variance.sqrt() + EPS)
