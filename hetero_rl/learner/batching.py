"""Rollouts -> micro-batches. Response tokens become flat arrays, so that no maths ever sees padding.

Two layouts. *Packed*: all tokens in one row and each distinct prompt once, however many responses it has; only the attention
knows which tokens see which. *Padded*: a row per sequence, for models and devices whose attention cannot be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetero_rl.learner.attention import LONGEST_PACKED, Packing, ResponseSpan, pack
from hetero_rl.learner.routing import NO_ROUTE

Tokens = Sequence[int] | NDArray[np.int32]
Routes = NDArray[np.int16]
MAX_ATTENTION_PADDING = 4
"""Keys that the attention of a packed batch may gather, padding included, in multiples of the batch's budget of tokens."""


class _Sequence(NamedTuple):
    """A prompt with its response. Responses share their prompt where its tokens, and what routes they took, are the same: its `key`."""

    prompt: tuple[int, ...]
    response: Tokens
    routes: Routes | None
    key: tuple[tuple[int, ...], bytes]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Token ids and the flat positions of their response tokens.

    `input_ids`: int64 [num_rows, length]. `places`: int64 [num_tokens], where in [num_rows * length] the logits lie that
    predict each response token; `targets`: int64 [num_tokens], those tokens. `indices`: the sequences' places in the input, and
    `lengths` their numbers of response tokens. `position_ids`: int64 [1, length] of a packed batch, with its `packing`.
    `routes`: int64 [num_rows * length, num_layers, top_k], the engine's experts for each input token, `NO_ROUTE` at padding.
    Padding is on the right and needs no mask: causal attention never looks ahead, and outputs at padding are not read.
    """

    input_ids: Tensor
    places: Tensor
    targets: Tensor
    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    position_ids: Tensor | None = None
    packing: Packing | None = None
    routes: Tensor | None = None

    def flatten(self, arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Concatenate the per-token arrays of this batch's sequences: float32 [num_tokens]."""
        return torch.from_numpy(np.concatenate([arrays[i] for i in self.indices]).astype(np.float32)).to(device)

    def unflatten(self, values: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Cut a flat [num_tokens] tensor back into (place in the input, array of one sequence)."""
        yield from zip(self.indices, np.split(values.cpu().numpy(), np.cumsum(self.lengths)[:-1]), strict=True)


def micro_batches(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Tokens],
    max_tokens: int,
    device: torch.device,
    *,
    packed: bool,
    routes: Sequence[Routes] | None = None,
) -> Iterator[MicroBatch]:
    """Cut into batches of at most `max_tokens` tokens, padding included; a longer single sequence gets a batch of its own.

    `packed` packs the sequences of at most `attention.LONGEST_PACKED` tokens; longer ones get a row each. `routes`: those of each
    sequence's input tokens, as `Generation.routes` has them.
    """
    assert all(len(response) > 0 for response in responses), "an engine answers with one token at least"
    sequences = []
    for i, (prompt, response) in enumerate(zip(map(tuple, prompts), responses, strict=True)):
        taken = None if routes is None else routes[i]
        sequences.append(_Sequence(prompt, response, taken, (prompt, b"" if taken is None else taken[: len(prompt)].tobytes())))
    short = [i for i, sequence in enumerate(sequences) if packed and sequence.length <= LONGEST_PACKED]
    long = [i for i, sequence in enumerate(sequences) if not packed or sequence.length > LONGEST_PACKED]
    for indices in _padded_cuts(long, sequences, max_tokens):
        yield collate_padded(indices, [sequences[i] for i in indices], device)
    for indices in _packed_cuts(short, sequences, max_tokens):
        yield collate_packed(indices, [sequences[i] for i in indices], device)


def _padded_cuts(candidates: Sequence[int], sequences: Sequence[_Sequence], max_tokens: int) -> Iterator[list[int]]:
    """Sorted by length, so that little is padding."""
    order = sorted(candidates, key=lambda i: (-sequences[i].length, i))
    start = 0
    while start < len(order):
        num_sequences = max(1, max_tokens // sequences[order[start]].length)
        yield order[start : start + num_sequences]
        start += num_sequences


def _packed_cuts(candidates: Sequence[int], sequences: Sequence[_Sequence], max_tokens: int) -> Iterator[list[int]]:
    """Responses to one prompt stay together, and groups of similar length, so that the attention pads little."""
    longest: dict[tuple[tuple[int, ...], bytes], int] = {}
    for i in candidates:
        longest[sequences[i].key] = max(longest.get(sequences[i].key, 0), sequences[i].length)
    order = sorted(candidates, key=lambda i: (-longest[sequences[i].key], sequences[i].key, -len(sequences[i].response), i))
    batch: list[int] = []
    num_tokens, widest = 0, 0
    for i in order:
        sequence = sequences[i]
        shared = bool(batch) and sequences[batch[-1]].key == sequence.key
        added = len(sequence.response) - 1 + (0 if shared else len(sequence.prompt))
        widest = max(widest, sequence.length)
        if batch and (num_tokens + added > max_tokens or (len(batch) + 1) * widest > MAX_ATTENTION_PADDING * max_tokens):
            yield batch
            batch, num_tokens, added = [], 0, sequence.length - 1
            widest = sequence.length
        batch.append(i)
        num_tokens += added
    if batch:
        yield batch


def collate_padded(indices: Sequence[int], sequences: Sequence[_Sequence], device: torch.device) -> MicroBatch:
    """One row per sequence, padded on the right."""
    # The last token of a sequence predicts nothing that is read, so its column need not be computed.
    length = max(sequence.length for sequence in sequences) - 1
    input_ids = np.zeros((len(indices), length), dtype=np.int64)
    inputs = []
    for row, sequence in enumerate(sequences):
        input_ids[row, : sequence.length - 1] = [*sequence.prompt, *sequence.response[:-1]]
        inputs.append(row * length + np.arange(sequence.length - 1))
    return _micro_batch(indices, input_ids, inputs, sequences, device)


def collate_packed(indices: Sequence[int], sequences: Sequence[_Sequence], device: torch.device) -> MicroBatch:
    """All in one row: each distinct prompt, its responses after it, none of which sees another."""
    ids: list[int] = []
    positions: list[int] = []
    inputs: list[NDArray[np.int64]] = []
    prompts: dict[tuple[tuple[int, ...], bytes], tuple[int, int]] = {}
    spans: list[ResponseSpan] = []
    for prompt, response, _, key in sequences:
        if key not in prompts:
            prompts[key] = (len(ids), len(prompt))
            ids += prompt
            positions += range(len(prompt))
        # The last token of a response predicts nothing that is read, so it need not be there.
        span = ResponseSpan(*prompts[key], len(ids), len(response) - 1)
        ids += map(int, response[:-1])
        positions += range(len(prompt), len(prompt) + span.length)
        inputs.append(np.r_[span.prompt_start : span.prompt_start + len(prompt), span.start : span.start + span.length])
        spans.append(span)
    packing = pack(list(prompts.values()), spans, len(ids), device)
    batch = _micro_batch(indices, np.array([ids]), inputs, sequences, device)
    return replace(batch, position_ids=torch.tensor([positions], device=device), packing=packing)


def _micro_batch(
    indices: Sequence[int],
    input_ids: NDArray[np.int64],
    inputs: Sequence[NDArray[np.int64]],
    sequences: Sequence[_Sequence],
    device: torch.device,
) -> MicroBatch:
    """`inputs`: where in [num_rows * length] the input tokens of each sequence lie; from the prompt's last on they predict the response."""

    def on_device(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    places = np.concatenate([own[len(sequence.prompt) - 1 :] for own, sequence in zip(inputs, sequences, strict=True)])
    targets = np.concatenate([np.asarray(sequence.response, dtype=np.int64) for sequence in sequences])
    lengths = tuple(len(sequence.response) for sequence in sequences)
    routes = None
    if sequences[0].routes is not None:
        routes = np.full((input_ids.size, *sequences[0].routes.shape[1:]), NO_ROUTE, np.int64)
        for own, sequence in zip(inputs, sequences, strict=True):
            routes[own] = sequence.routes
    return MicroBatch(
        on_device(input_ids),
        on_device(places),
        on_device(targets),
        tuple(indices),
        lengths,
        routes=None if routes is None else on_device(routes),
    )
