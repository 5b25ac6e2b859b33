"""AWQ: input channels that matter are stored larger, and what feeds them hands out less (arXiv 2306.00978, section 3.2).

W x = (W s) (x / s): rounding W s instead of W costs a channel with s > 1 less. The division is folded into the layer before,
so that the engine computes nothing more. Scales are powers of two here: weights, norms and biases are multiplied by them
without a rounding, so the engine computes with exactly Q(W s) / s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_EXPONENTS = 21
"""Exponents alpha from 0 to 1 that are tried; 0 is round-to-nearest."""
MAX_ROWS = 512
"""Output channels, evenly spaced, on which they are tried."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Values of `model_type` whose layers feed each other as `FOLDS` says, with norms that multiply by their weight alone."""
_LAYER = re.compile(r"(?P<layer>.*\blayers\.\d+)\.(?P<part>.+)\.weight")
_FOLDS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
"""Layer -> what its input channels are divided in."""


@dataclass(frozen=True, slots=True)
class Fold:
    """The module `source` hands its outputs to nothing but `consumers`, weight names; all of them are scaled alike."""

    source: str
    consumers: tuple[str, ...]


def folds(quantized: Sequence[str]) -> list[Fold]:
    """The folds of a model whose weights `quantized` are rounded; a source of which only some consumers are has none."""
    names = set(quantized)
    found = []
    for layer in dict.fromkeys(match["layer"] for match in map(_LAYER.fullmatch, quantized) if match):
        for source in dict.fromkeys(_FOLDS.values()):
            consumers = tuple(f"{layer}.{part}.weight" for part, fed_by in _FOLDS.items() if fed_by == source)
            if names.issuperset(consumers):
                found.append(Fold(f"{layer}.{source}", consumers))
    return found


def search_scales(weights: Sequence[Tensor], gram: Tensor, served: Callable[[Tensor], Tensor]) -> Tensor:
    """The scale of each input channel, float32 [in], powers of two, with the least output error of all `weights` [out, in] together.

    Tried are rms(x)^alpha, scaled to a geometric mean of 1 between its largest and smallest, for alpha in [0, 1]. The error of
    E = served(W s) / s - W on inputs of mean Gram matrix G is tr(E G E^T); `served` is what the grid makes of a matrix.
    """
    rms = gram.diagonal().clamp(min=0).sqrt()
    best = previous = torch.ones_like(rms)
    if not rms.any():
        return best
    exponents = rms.clamp(min=1e-4 * float(rms.max())).log2()
    exponents = exponents - (exponents.max() + exponents.min()) / 2
    rows = [weight[:: -(-len(weight) // MAX_ROWS)].float() for weight in weights]
    least = float("inf")
    for step in range(NUM_EXPONENTS):
        scales = torch.exp2((step / (NUM_EXPONENTS - 1) * exponents).round())
        if step and torch.equal(scales, previous):
            continue
        previous = scales
        error = sum(output_error(served(weight * scales) / scales - weight, gram) for weight in rows)
        if error < least:
            best, least = scales, error
    return best


def output_error(error: Tensor, gram: Tensor) -> float:
    """tr(E G E^T): the mean square length of E x over the inputs x, for `error` E float32 [out, in] and their mean `gram` [in, in]."""
    return float(((error @ gram) * error).sum(dtype=torch.float64))
