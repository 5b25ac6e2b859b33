"""Responses by the high-fidelity model itself, through transformers' own generation: to compare with, not to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deploy_targets.types import Sampling


@torch.no_grad()
def generate_responses(
    lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, tokens_per_pass: int, device: torch.device
) -> list[list[int]]:
    """One response of the causal LM `lm` to each prompt, stop token included, in order; a pass holds `tokens_per_pass` at most.

    Drawn from the whole distribution at the temperature, without top-k or top-p, by a generator seeded with `sampling.seed`. `device` is
    where it computes, which its parameters need not lie on under ZeRO.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max(len(prompt) for prompt in prompts) + sampling.max_tokens
    num_rows = max(1, tokens_per_pass // longest)
    pad = sampling.stop_token_ids[0] if sampling.stop_token_ids else 0
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    responses: dict[int, list[int]] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        for start in range(0, len(order), num_rows):
            rows = order[start : start + num_rows]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.zeros((len(rows), width), dtype=torch.int64, device=device)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(rows):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            out = lm.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=list(sampling.stop_token_ids) or None,
                pad_token_id=pad,
                **how,
            )
            for row, index in enumerate(rows):
                responses[index] = _up_to_stop(out[row, width:].tolist(), sampling.stop_token_ids)
    return [responses[index] for index in range(len(prompts))]


def _up_to_stop(tokens: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in stop_token_ids:
            return tokens[: position + 1]
    return tokens
