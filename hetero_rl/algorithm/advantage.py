"""How much better a response was than its siblings."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO advantages: (r - mean of the group) / (standard deviation of the group + eps).

    Args:
        rewards: float32 [num_groups, group_size]; NaN marks a response without a reward (dropped).
        normalize_std: False leaves out the division (Dr. GRPO, arXiv 2503.20783).
        eps: Added to the standard deviation.

    Returns:
        float32 [num_groups, group_size]; 0 for dropped responses and for groups whose rewards are all equal.

    Source: Shao et al., arXiv 2402.03300, section 4.1.2. The standard deviation is the unbiased one.
    """
    valid = torch.isfinite(rewards)
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    filled = torch.where(valid, rewards, 0.0)
    centered = torch.where(valid, filled - filled.sum(dim=1, keepdim=True) / count, 0.0)
    if not normalize_std:
        return centered
    variance = (centered**2).sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    # A group of equal rewards has no signal; its centred rewards are rounding noise that eps would blow up.
    return torch.where(variance > eps**2, centered / (variance.sqrt() + eps), 0.0)
