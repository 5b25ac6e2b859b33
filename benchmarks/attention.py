"""Attention of the learner on short sequences: `short_causal_attention` against torch's fused CPU kernel, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.common import arguments, in_turns, measurement, write
from hetero_rl.learner.attention import short_causal_attention

SHAPES = ((256, 12), (256, 72), (128, 128), (96, 192), (64, 256))
QUICK_SHAPES = ((8, 12), (8, 72))
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
HEADLINE_LENGTH = 72
REPEATS = 5
"""Passes timed together: one alone takes a few ms."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(batch: int, length: int) -> Inputs:
    """Query, key, value as a transformers layer hands them over (transposed views), and a gradient of the output."""
    torch.manual_seed(length)

    def states(num_heads: int) -> Tensor:
        return torch.randn(batch, length, num_heads, HEAD_DIM).bfloat16().transpose(1, 2).requires_grad_()

    gradient = torch.randn(batch, length, NUM_HEADS * HEAD_DIM).bfloat16()
    return states(NUM_HEADS), states(NUM_KV_HEADS), states(NUM_KV_HEADS), gradient


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What the learner runs on a CPU."""
    out, _ = short_causal_attention(torch.nn.Module(), query, key, value, None)
    return out.reshape(*out.shape[:2], -1)


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What transformers runs as "sdpa": torch.nn.functional.scaled_dot_product_attention, is_causal, no mask."""
    layer: Any = SimpleNamespace(num_key_value_groups=NUM_HEADS // NUM_KV_HEADS, is_causal=True)
    out, _ = sdpa_attention_forward(layer, query, key, value, None)
    return out.reshape(*out.shape[:2], -1)


def fused_repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same kernel on keys and values repeated for each query head, which is another path through it."""
    group = NUM_HEADS // NUM_KV_HEADS
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    return out.reshape(*out.shape[:2], -1)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V in fp64, step by step."""
    group = NUM_HEADS // NUM_KV_HEADS
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    length = query.shape[2]
    scores = query @ key.transpose(2, 3) * HEAD_DIM**-0.5
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    out = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    return out.reshape(*out.shape[:2], -1)


def forward_backward(attention: Callable[..., Tensor], inputs: Inputs) -> float:
    """Milliseconds of one forward and backward pass, mean of `REPEATS`."""
    query, key, value, gradient = inputs
    start = time.perf_counter()
    for _ in range(REPEATS):
        torch.autograd.grad(attention(query, key, value), (query, key, value), gradient)
    return (time.perf_counter() - start) / REPEATS * 1e3


def max_errors(attention: Callable[..., Tensor], inputs: Inputs) -> dict[str, float]:
    """Largest abs difference to fp64 on the same bf16 inputs: of the output, and of the gradients of query, key and value."""
    *states, gradient = inputs
    doubles = [state.detach().double().requires_grad_() for state in states]
    wanted, out = exact(*doubles), attention(*states)
    wanted_grads = torch.autograd.grad(wanted, doubles, gradient.double())
    grads = torch.autograd.grad(out, states, gradient)
    return {
        "output": float((out.detach().double() - wanted.detach()).abs().max()),
        "gradients": max(float((a.double() - b).abs().max()) for a, b in zip(grads, wanted_grads, strict=True)),
    }


def main() -> None:
    options = arguments("attention", __doc__, rounds=15)
    torch.set_num_threads(options.threads)
    cases = {}
    shapes = QUICK_SHAPES if options.quick else SHAPES
    sides = {"short_causal": ours, "fused": fused, "fused_repeated_kv": fused_repeated}
    for batch, length in shapes:
        inputs = make_inputs(batch, length)
        times = in_turns({side: partial(forward_backward, function, inputs) for side, function in sides.items()}, options.rounds)
        baseline = [min(pair) for pair in zip(times["fused"], times["fused_repeated_kv"], strict=True)]
        cases[f"{batch}x{length}"] = measurement(
            times["short_causal"],
            "ms forward + backward",
            baseline=baseline,
            ratio_of="fused kernel (the faster of two ways to call it) / short_causal, times",
            inverse=True,
            fused_runs=times["fused"],
            fused_repeated_kv_runs=times["fused_repeated_kv"],
            max_abs_error={side: max_errors(function, inputs) for side, function in sides.items()},
        )
    headline = next(name for name in cases if name.endswith(f"x{HEADLINE_LENGTH}"))
    write(options, cases, headline, {"dtype": "bfloat16", "heads": NUM_HEADS, "kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM})


if __name__ == "__main__":
    main()
