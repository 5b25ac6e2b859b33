"""Rollouts -> padded micro-batches. Response tokens become flat arrays, so that no maths ever sees padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded sequences and the flat positions of their response tokens.

    `input_ids`: int64 [num_sequences, length]. `rows`, `columns`: int64 [num_tokens], where the logits lie that predict
    each response token; `targets`: int64 [num_tokens], those tokens. `indices`: the sequences' places in the input.
    Right padding needs no attention mask: causal attention never looks ahead, and outputs at padding are not read.
    """

    input_ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    indices: tuple[int, ...]
    lengths: tuple[int, ...]

    def flatten(self, arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Concatenate the per-token arrays of this batch's sequences: float32 [num_tokens]."""
        return torch.from_numpy(np.concatenate([arrays[i] for i in self.indices]).astype(np.float32)).to(device)

    def unflatten(self, values: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Cut a flat [num_tokens] tensor back into (place in the input, array of one sequence)."""
        yield from zip(self.indices, np.split(values.cpu().numpy(), np.cumsum(self.lengths)[:-1]), strict=True)


def micro_batches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int] | np.ndarray], max_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Sort by length, cut where the padded size would pass `max_tokens`; a longer single sequence gets a batch of its own."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        num_sequences = max(1, max_tokens // longest)
        yield _collate(order[start : start + num_sequences], prompts, responses, longest, device)
        start += num_sequences


def _collate(
    indices: list[int], prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int] | np.ndarray], length: int, device: torch.device
) -> MicroBatch:
    input_ids = np.zeros((len(indices), length), dtype=np.int64)
    rows, columns, targets = [], [], []
    for row, index in enumerate(indices):
        prompt, response = prompts[index], responses[index]
        end = len(prompt) + len(response)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = response
        rows.append(np.full(len(response), row))
        columns.append(np.arange(len(prompt) - 1, end - 1))
        targets.append(np.asarray(response, dtype=np.int64))

    def flat(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    # The last token of a sequence predicts nothing that is read, so its column need not be computed.
    return MicroBatch(
        torch.from_numpy(input_ids[:, : length - 1]).to(device),
        flat(rows),
        flat(columns),
        flat(targets),
        tuple(indices),
        tuple(len(responses[i]) for i in indices),
    )
