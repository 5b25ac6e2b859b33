"""Rollouts -> micro-batches. Response tokens become flat arrays, so that no maths ever sees padding.

Two layouts. *Packed*: all tokens in one row and each distinct prompt once, however many responses it has; only the attention
knows which tokens see which. *Padded*: a row per sequence, for models and devices whose attention cannot be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetero_rl.learner.attention import LONGEST_PACKED, Packing, ResponseSpan, pack

Tokens = Sequence[int] | NDArray[np.int32]
MAX_ATTENTION_PADDING = 4
"""Keys that the attention of a packed batch may gather, padding included, in multiples of the batch's budget of tokens."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Token ids and the flat positions of their response tokens.

    `input_ids`: int64 [num_rows, length]. `places`: int64 [num_tokens], where in [num_rows * length] the logits lie that
    predict each response token; `targets`: int64 [num_tokens], those tokens. `indices`: the sequences' places in the input, and
    `lengths` their numbers of response tokens. `position_ids`: int64 [1, length] of a packed batch, with its `packing`.
    Padding is on the right and needs no mask: causal attention never looks ahead, and outputs at padding are not read.
    """

    input_ids: Tensor
    places: Tensor
    targets: Tensor
    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    position_ids: Tensor | None = None
    packing: Packing | None = None

    def flatten(self, arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Concatenate the per-token arrays of this batch's sequences: float32 [num_tokens]."""
        return torch.from_numpy(np.concatenate([arrays[i] for i in self.indices]).astype(np.float32)).to(device)

    def unflatten(self, values: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Cut a flat [num_tokens] tensor back into (place in the input, array of one sequence)."""
        yield from zip(self.indices, np.split(values.cpu().numpy(), np.cumsum(self.lengths)[:-1]), strict=True)


def micro_batches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Tokens], max_tokens: int, device: torch.device, *, packed: bool
) -> Iterator[MicroBatch]:
    """Cut into batches of at most `max_tokens` tokens, padding included; a longer single sequence gets a batch of its own.

    `packed` packs the sequences of at most `attention.LONGEST_PACKED` tokens; longer ones get a row each.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    assert all(len(response) > 0 for response in responses), "an engine answers with one token at least"
    short = [i for i in range(len(lengths)) if packed and lengths[i] <= LONGEST_PACKED]
    long = [i for i in range(len(lengths)) if not packed or lengths[i] > LONGEST_PACKED]
    for indices in _padded_cuts(long, lengths, max_tokens):
        yield collate_padded(indices, [prompts[i] for i in indices], [responses[i] for i in indices], device)
    for indices in _packed_cuts(short, prompts, responses, max_tokens):
        yield collate_packed(indices, [prompts[i] for i in indices], [responses[i] for i in indices], device)


def _padded_cuts(candidates: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Sorted by length, so that little is padding."""
    order = sorted(candidates, key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        num_sequences = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + num_sequences]
        start += num_sequences


def _packed_cuts(
    candidates: Sequence[int], prompts: Sequence[Sequence[int]], responses: Sequence[Tokens], max_tokens: int
) -> Iterator[list[int]]:
    """Responses to one prompt stay together, and groups of similar length, so that the attention pads little."""
    longest: dict[tuple[int, ...], int] = {}
    for i in candidates:
        key = tuple(prompts[i])
        longest[key] = max(longest.get(key, 0), len(key) + len(responses[i]))
    order = sorted(candidates, key=lambda i: (-longest[tuple(prompts[i])], tuple(prompts[i]), -len(responses[i]), i))
    batch: list[int] = []
    num_tokens, widest = 0, 0
    for i in order:
        shared = bool(batch) and tuple(prompts[batch[-1]]) == tuple(prompts[i])
        added = len(responses[i]) - 1 + (0 if shared else len(prompts[i]))
        widest = max(widest, len(prompts[i]) + len(responses[i]))
        if batch and (num_tokens + added > max_tokens or (len(batch) + 1) * widest > MAX_ATTENTION_PADDING * max_tokens):
            yield batch
            batch, num_tokens, added = [], 0, len(responses[i]) - 1 + len(prompts[i])
            widest = len(prompts[i]) + len(responses[i])
        batch.append(i)
        num_tokens += added
    if batch:
        yield batch


def collate_padded(
    indices: Sequence[int], prompts: Sequence[Sequence[int]], responses: Sequence[Tokens], device: torch.device
) -> MicroBatch:
    """One row per sequence, padded on the right."""
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    input_ids = np.zeros((len(indices), length), dtype=np.int64)
    places = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = response
        places.append(row * (length - 1) + np.arange(len(prompt) - 1, end - 1))
    # The last token of a sequence predicts nothing that is read, so its column need not be computed.
    return _micro_batch(indices, input_ids[:, : length - 1], places, responses, device)


def collate_packed(
    indices: Sequence[int], prompts: Sequence[Sequence[int]], responses: Sequence[Tokens], device: torch.device
) -> MicroBatch:
    """All in one row: each distinct prompt, its responses after it, none of which sees another."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[NDArray[np.int64]] = []
    starts: dict[tuple[int, ...], int] = {}
    spans: list[ResponseSpan] = []
    for prompt, response in zip(map(tuple, prompts), responses, strict=True):
        if prompt not in starts:
            starts[prompt] = len(ids)
            ids += prompt
            positions += range(len(prompt))
        # The last token of a response predicts nothing that is read, so it need not be there.
        span = ResponseSpan(starts[prompt], len(prompt), len(ids), len(response) - 1)
        ids += map(int, response[:-1])
        positions += range(len(prompt), len(prompt) + span.length)
        places.append(np.array([span.prompt_start + len(prompt) - 1, *range(span.start, span.start + span.length)], np.int64))
        spans.append(span)
    packing = pack([(start, len(prompt)) for prompt, start in starts.items()], spans, len(ids), device)
    batch = _micro_batch(indices, np.array([ids]), places, responses, device)
    return replace(batch, position_ids=torch.tensor([positions], device=device), packing=packing)


def _micro_batch(
    indices: Sequence[int],
    input_ids: NDArray[np.int64],
    places: Sequence[NDArray[np.int64]],
    responses: Sequence[Tokens],
    device: torch.device,
) -> MicroBatch:
    def on_device(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    targets = np.concatenate([np.asarray(response, dtype=np.int64) for response in responses])
    lengths = tuple(len(response) for response in responses)
    return MicroBatch(on_device(input_ids), on_device(np.concatenate(places)), on_device(targets), tuple(indices), lengths)
