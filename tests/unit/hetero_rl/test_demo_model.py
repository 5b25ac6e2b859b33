"""The shipped demo model: its bytes, its tokenizer, what it can do, and that its script makes the same bytes twice."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hetero_rl
from hetero_rl.tasks import load_task
from hetero_rl.tasks.config import ArithmeticConfig

FOLDER = Path(hetero_rl.__file__).parent / "data" / "demo_model"
SCRIPT = Path(__file__).parents[3] / "scripts" / "make_demo_model.py"
WEIGHTS_SHA256 = "907da17f1e702a9a3083ff4a5f80be63f9c64dfccc1637c1fecacd3e4886ff78"
"""What scripts/make_demo_model.py printed when the shipped file was made."""


def test_the_weights_are_those_the_script_made() -> None:
    assert sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256


def test_everything_together_is_under_six_megabytes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6_000_000


def test_weights_are_finite_bf16_with_dimensions_that_every_quantizer_takes() -> None:
    for name, tensor in load_file(FOLDER / "model.safetensors").items():
        assert tensor.dtype is torch.bfloat16, name
        assert torch.isfinite(tensor).all(), name
        assert all(size % 64 == 0 for size in tensor.shape), name


def test_every_character_survives_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "\n" + "".join(chr(code) for code in range(32, 127)) + "  two spaces , and ' n't .\n\n"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text)
    assert len(tokenizer) == len(set(tokens)) + 4
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]


def test_special_tokens_agree_with_the_config() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    config = AutoModelForCausalLM.from_pretrained(FOLDER).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) <= config.vocab_size


def test_it_gets_about_half_of_the_heldout_problems_right() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    task = load_task(ArithmeticConfig(), tokenizer, seed=0)
    problems = task.heldout_problems(1000)
    prompts = torch.tensor([task.encode_prompt(problem) for problem in problems])
    with torch.no_grad():
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
    completions = tokens[:, prompts.shape[1] :]
    rewards = task.reward(problems, task.decode_completions(completions.tolist()))
    assert 0.40 <= sum(reward or 0 for reward in rewards) / len(rewards) <= 0.60
    assert (completions == tokenizer.eos_token_id).any(dim=1).all(), "every answer ends"


@pytest.mark.slow
def test_the_script_makes_the_same_bytes_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check-steps", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.split(": ")[1].strip().split(" and ")
    assert len(first) == 64
    assert first == second
    assert not list(tmp_path.iterdir())
