"""Models that solve about half of a task: supervised learning on written-out solutions, stopped on purpose by held-out accuracy."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.evidence.tasks import NUM_HELDOUT, NUM_TRAIN, Sample, samples
from hetero_rl.model import resolve_model

SEED = 314_159
BATCH_SIZE, PEAK_LR, WARMUP_STEPS, MAX_STEPS = 64, 1e-3, 50, 6000
TEST_EVERY, TEST_EVERY_NEAR, NUM_TEST = 50, 10, 200
NEAR_ACCURACY, STOP_ACCURACY = 0.25, 0.4
"""From the first on it is tested more often: a model may learn a whole task in fifty steps."""


@dataclass(frozen=True, slots=True)
class Size:
    """Layers and width of a Qwen3; rows are whole blocks of 256, which K-quants need."""

    num_layers: int
    width: int


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"3M": Size(4, 256), "10M": Size(5, 512), "100M": Size(12, 768)}


def warm_start(task: str, size: Size, folder: Path) -> float:
    """Train on problems that no run sees and save model and tokenizer in `folder`; returns the held-out accuracy it stopped at."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=192, hidden_size=size.width, intermediate_size=2 * size.width, num_hidden_layers=size.num_layers,
            num_attention_heads=size.width // 64, num_key_value_heads=size.width // 128, head_dim=64, max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).to(DEVICE)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    drawn, tests = fresh_samples(task, 1), list(islice(fresh_samples(task, 2), NUM_TEST))
    accuracy = 0.0
    for step in range(MAX_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / MAX_STEPS)))
        inputs, labels = batch(tokenizer, list(islice(drawn, BATCH_SIZE)))
        loss = functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % (TEST_EVERY if accuracy < NEAR_ACCURACY else TEST_EVERY_NEAR) == 0:
            accuracy = solved(model, tokenizer, tests)
            print(f"  warm start of {task}: step {step}, loss {loss.item():.3f}, solved {accuracy:.2f}", file=sys.stderr, flush=True)
            if accuracy >= STOP_ACCURACY:
                break
    model.eval().cpu().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return accuracy


def fresh_samples(task: str, seed: int) -> Iterator[Sample]:
    """Problems that are neither trained on nor held out in any run."""
    of_runs = {sample.prompt for sample in islice(samples(task), NUM_TRAIN + NUM_HELDOUT)}
    return (sample for sample in samples(task, seed) if sample.prompt not in of_runs)


def batch(tokenizer: Any, drawn: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token labels, int64 [num_samples, length]; labels are -100 outside the solution and its end."""
    rows = [(tokenizer.encode(s.prompt), [*tokenizer.encode(s.solution), tokenizer.eos_token_id]) for s in drawn]
    length = max(len(prompt) + len(solution) for prompt, solution in rows) - 1
    inputs, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    for index, (prompt, solution) in enumerate(rows):
        tokens = prompt + solution
        inputs[index, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[index, len(prompt) - 1 : len(tokens) - 1] = torch.tensor(solution)
    return inputs.to(DEVICE), labels.to(DEVICE)


@torch.no_grad()
def solved(model: Any, tokenizer: Any, tests: Sequence[Sample]) -> float:
    """Share of `tests` whose solution the model writes out exactly, greedily; prompts are as long as each other."""
    prompts = torch.tensor([tokenizer.encode(s.prompt) for s in tests], device=DEVICE)
    longest = max(len(s.solution) for s in tests) + 1
    tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=longest, do_sample=False)
    texts = tokenizer.batch_decode(tokens[:, prompts.shape[1] :], skip_special_tokens=True)
    return sum(text == s.solution for text, s in zip(texts, tests, strict=True)) / len(tests)
