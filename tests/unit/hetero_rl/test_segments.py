"""Sums and means per response."""

from __future__ import annotations

import torch

from hetero_rl.algorithm.segments import Segments


def test_sums_means_and_spread_of_ragged_responses() -> None:
    segments = Segments.of([2, 1, 3])
    values = torch.tensor([1.0, 2.0, float("nan"), 4.0, 5.0, 6.0], requires_grad=True)
    mask = torch.tensor([True, True, False, True, False, True])
    assert segments.sum(values, mask).tolist() == [3.0, 0.0, 10.0]
    assert segments.mean(values, mask).tolist() == [1.5, 0.0, 5.0]
    assert segments.spread(torch.tensor([7.0, 8.0, 9.0])).tolist() == [7.0, 7.0, 8.0, 9.0, 9.0, 9.0]
    segments.sum(values, mask).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0], "NaN outside the mask has no gradient"


def test_tokens_may_come_in_any_order() -> None:
    segments = Segments(torch.tensor([1, 0, 1]), 2)
    assert segments.sum(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool)).tolist() == [2.0, 4.0]
