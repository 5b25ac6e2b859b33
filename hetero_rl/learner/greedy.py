"""What the learner itself answers: greedy continuations by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def greedy_responses(
    lm: Any, prompts: Sequence[Sequence[int]], max_tokens: int, stop_token_ids: Sequence[int], tokens_per_pass: int, device: torch.device
) -> list[list[int]]:
    """Greedy continuations of `prompts` by the causal LM `lm`, stop token included, in order; a pass holds `tokens_per_pass` at most.

    `device` is where it computes, which its parameters need not lie on under ZeRO.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max(len(prompt) for prompt in prompts) + max_tokens
    num_rows = max(1, tokens_per_pass // longest)
    responses: dict[int, list[int]] = {}
    with torch.no_grad():
        for start in range(0, len(order), num_rows):
            rows = order[start : start + num_rows]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.zeros((len(rows), width), dtype=torch.int64, device=device)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(rows):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            pad = stop_token_ids[0] if stop_token_ids else 0
            out = lm.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=list(stop_token_ids) or None,
                pad_token_id=pad,
            )
            for row, index in enumerate(rows):
                responses[index] = _up_to_stop(out[row, width:].tolist(), stop_token_ids)
    return [responses[index] for index in range(len(prompts))]


def _up_to_stop(tokens: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in stop_token_ids:
            return tokens[: position + 1]
    return tokens
