"""What linear layers see: the mean of x x^T over their inputs, while the model reads given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hetero_rl.learner.fake_quant import TwinLayer, TwinLinear


class _Accumulator:
    """Sums of x x^T by weight name, float32 [in, in]; layers that are handed the very same tensor share one."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_tokens = 0
        self._leader: dict[str, str] = {}
        self._seen: tuple[Tensor, str] | None = None
        self._mask: Tensor | None = None

    def begin(self, mask: Tensor) -> None:
        """The next inputs belong to tokens of which `mask`, bool [num_rows * length], tells the real ones from the padding."""
        self._mask, self._seen = mask, None
        self.num_tokens += int(mask.sum())

    def add(self, name: str, inputs: Tensor) -> None:
        """Count the inputs [num_rows, length, in] of the layer whose weight is `name`."""
        if self._seen is not None and self._seen[0] is inputs:
            self._leader[name] = self._seen[1]
            return
        self._leader[name], self._seen = name, (inputs, name)
        tokens = inputs.flatten(0, -2)[self._mask].float()
        if name in self.sums:
            self.sums[name].addmm_(tokens.t(), tokens)
        else:
            self.sums[name] = tokens.t() @ tokens

    def means(self) -> dict[str, Tensor]:
        """Weight name -> mean over the tokens; layers that share their inputs share the tensor."""
        means = {name: total.div_(self.num_tokens) for name, total in self.sums.items()}
        return {name: means[leader] for name, leader in self._leader.items()}


def input_grams(lm: Any, layers: Sequence[TwinLayer], sequences: Sequence[Sequence[int]], max_tokens: int) -> dict[str, Tensor]:
    """Weight name -> mean of x x^T over the inputs of that layer, float32 [in, in], for the linear ones among `layers` of `lm`.

    `sequences` are token ids; the last token of each is never an input. Rows are padded on the right, at most `max_tokens`
    a batch, padding included; causal attention never looks ahead, and what comes out at the padding is not counted. The same
    weights and sequences give the same bits on the same machine.
    """
    accumulator = _Accumulator()
    linears = [layer for layer in layers if isinstance(layer, TwinLinear)]
    head = lm.get_output_embeddings()
    device = head.weight.device
    with torch.no_grad(), ExitStack() as stack:
        for layer in linears:
            stack.callback(layer.register_forward_pre_hook(_counting(accumulator, layer.weight_name)).remove)
        for ids, mask in _batches(sequences, max_tokens):
            accumulator.begin(mask.flatten().to(device))
            hidden = lm.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
            if any(layer is head for layer in linears):
                accumulator.add(head.weight_name, hidden)
    return accumulator.means()


def _counting(accumulator: _Accumulator, name: str) -> Any:
    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        accumulator.add(name, inputs[0])

    return count


def _batches(sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(token ids int64 [num_rows, length], which of them are real, bool), the longest first."""
    rows = sorted((list(tokens[:-1]) for tokens in sequences if len(tokens) > 1), key=len, reverse=True)
    start = 0
    while start < len(rows):
        length = len(rows[start])
        taken = rows[start : start + max(1, max_tokens // length)]
        yield (
            torch.tensor([row + [0] * (length - len(row)) for row in taken]),
            torch.tensor([[place < len(row) for place in range(length)] for row in taken]),
        )
        start += len(taken)
