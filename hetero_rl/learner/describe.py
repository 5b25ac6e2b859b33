"""What a model says about given tokens, in full: for golden probes, where a training step needs the log-prob alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hetero_rl.learner.batching import MicroBatch
from hetero_rl.learner.compute import Float32Arithmetic
from hetero_rl.learner.policy import TokenStats

NUM_TOP = 8
"""Most probable tokens that are kept of each position, or the vocabulary where it is smaller."""


@dataclass(frozen=True, slots=True)
class Description:
    """Of the response tokens of one sequence, in nats at the rollout temperature.

    `logps`, `entropy`: float32 [num_scored], in the model's own arithmetic; `logps_fp32`: the same log-probs computed in float32.
    `greedy_tokens`: int64 [num_scored]. `top_ids`: int64, `top_logps`: float32 [num_scored, k], falling.
    """

    logps: NDArray[np.float32]
    logps_fp32: NDArray[np.float32]
    entropy: NDArray[np.float32]
    greedy_tokens: NDArray[np.int64]
    top_ids: NDArray[np.int64]
    top_logps: NDArray[np.float32]


@torch.no_grad()
def describe(forward: Callable[[MicroBatch, int], TokenStats], batches: Iterable[MicroBatch], *, is_float32: bool) -> list[Description]:
    """Descriptions in the order of the sequences that `batches` were cut from.

    `forward` takes a batch and how many top tokens to give. `is_float32`: it computes in float32, so that it need not run twice.
    """
    found: dict[int, Description] = {}
    for batch in batches:
        stats = forward(batch, NUM_TOP)
        if is_float32:
            exact = stats.logp
        else:
            with Float32Arithmetic():
                exact = forward(batch, 0).logp
        assert stats.top_ids is not None
        assert stats.top_logps is not None
        columns = (stats.logp, exact, stats.entropy, stats.greedy, stats.top_ids, stats.top_logps)
        for parts in zip(*(batch.unflatten(column) for column in columns), strict=True):
            found[parts[0][0]] = Description(*(array for _, array in parts))
    return [found[index] for index in range(len(found))]
