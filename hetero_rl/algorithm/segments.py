"""Sums and means per response over the flat tokens of a batch: sequence-level ratios, masks and normalisations need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Which response each token of a flat array belongs to: `ids` int64 [num_tokens] in [0, count)."""

    ids: Tensor
    count: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | None = None) -> Segments:
        """Responses of `lengths` tokens, one after the other."""
        sizes = torch.tensor(lengths, dtype=torch.int64, device=device)
        return cls(torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes), len(lengths))

    def sum(self, values: Tensor, mask: Tensor) -> Tensor:
        """Sum of `values` [num_tokens] where `mask` holds, per response: [count], with gradient. Values outside the mask may be NaN."""
        kept = torch.where(mask, values, torch.zeros_like(values))
        return kept.new_zeros(self.count).index_add(0, self.ids, kept)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean of `values` where `mask` holds, per response: [count]; 0 for a response where it holds nowhere."""
        return self.sum(values, mask) / self.sum(torch.ones_like(values), mask).clamp(min=1)

    def spread(self, per_response: Tensor) -> Tensor:
        """The number of each response at each of its tokens: [count] -> [num_tokens]."""
        return per_response[self.ids]
