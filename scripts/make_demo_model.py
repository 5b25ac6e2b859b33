"""Make the shipped demo model: a tiny Qwen3 that gets 48 % of all three-digit additions right.

    python scripts/make_demo_model.py --out hetero_rl/data/demo_model      two minutes on one core, the same bytes each time
    python scripts/make_demo_model.py --check-steps 3                      seconds: trains three steps twice and compares the bytes

The warm start is supervised learning on uniformly drawn problems of the training side of the `arithmetic` task, so the
held-out problems of a run are held out here too. It stops on purpose when close to half of the problems
are solved: reinforcement learning has the rest to do.
One thread and fixed seeds make the result exact on one kind of CPU with one version of torch; another kind gives
other last bits.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hetero_rl.tasks import load_task
from hetero_rl.tasks.base import Task, encode_prompt
from hetero_rl.tasks.config import ArithmeticConfig

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
VOCAB_SIZE = 192
MAX_LENGTH = 1024

SEED = 271_828  # not one of a usual run, whose first problems would then be those of the warm start
MAX_STEPS = 1100
STOP_ACCURACY = 0.45
STOP_PROBLEMS = 400
STOP_EVERY = 5
STOP_LOSS = 0.9
BATCH_SIZE = 64
PEAK_LR = 1e-3
WARMUP_STEPS = 50
NUM_TEST_PROBLEMS = 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("hetero_rl/data/demo_model"), help="folder to write")
    parser.add_argument("--check-steps", type=int, default=0, metavar="N", help="train N steps twice, compare, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    task = load_task(ArithmeticConfig(), tokenizer, seed=SEED)

    if arguments.check_steps:
        with tempfile.TemporaryDirectory() as folder:
            hashes = [save(warm_start(task, tokenizer, arguments.check_steps), tokenizer, Path(folder) / str(run)) for run in (1, 2)]
        print(f"sha256 of model.safetensors after {arguments.check_steps} steps: {hashes[0]} and {hashes[1]}")
        return int(hashes[0] != hashes[1])

    start = time.perf_counter()
    digest = save(warm_start(task, tokenizer, MAX_STEPS), tokenizer, arguments.out)
    print(f"trained for {time.perf_counter() - start:.0f} s; sha256 of model.safetensors: {digest}")
    # Loaded anew: `.to(bfloat16)` has rounded the rotary frequencies of the trained one too, which no user of the files does.
    saved = Qwen3ForCausalLM.from_pretrained(arguments.out, dtype=torch.bfloat16).eval()
    print(f"bf16 greedy accuracy on {NUM_TEST_PROBLEMS} held-out problems: {accuracy(saved, task, NUM_TEST_PROBLEMS):.3f}")
    return 0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; anything else is `<unk>`."""
    vocabulary = {piece: index for index, piece in enumerate((PAD, BOS, EOS, UNKNOWN, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> Qwen3ForCausalLM:
    """Random weights. Every dimension is a multiple of 64, which all quantizers need."""
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen3ForCausalLM(config)


def warm_start(task: Task, tokenizer: PreTrainedTokenizerFast, num_steps: int) -> Qwen3ForCausalLM:
    """Supervised learning of the answers: in fp32, AdamW with a cosine down to zero."""
    model = make_model().train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True
    )
    for step in range(num_steps):
        lr = PEAK_LR * min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / MAX_STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, labels = batch(task, tokenizer, step)
        logits = model(input_ids=inputs).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", file=sys.stderr)
        if step % STOP_EVERY == 0 and loss.item() < STOP_LOSS and accuracy(model, task, STOP_PROBLEMS) >= STOP_ACCURACY:
            print(f"step {step}: loss {loss.item():.4f}, stopped", file=sys.stderr)
            break
    return model.eval().to(torch.bfloat16)


def batch(task: Task, tokenizer: PreTrainedTokenizerFast, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token labels, int64 [BATCH_SIZE, length]; labels are -100 outside the answer and its `<eos>`."""
    rows = []
    for problem in task.train_problems(step, BATCH_SIZE):
        prompt = task.encode_prompt(problem)
        answer = (*encode_prompt(tokenizer, problem.answer), tokenizer.eos_token_id)
        rows.append((prompt + answer, len(prompt)))
    length = max(len(tokens) for tokens, _ in rows)
    inputs = torch.zeros(BATCH_SIZE, length - 1, dtype=torch.long)
    labels = torch.full((BATCH_SIZE, length - 1), -100)
    for index, (tokens, prompt_len) in enumerate(rows):
        inputs[index, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[index, prompt_len - 1 : len(tokens) - 1] = torch.tensor(tokens[prompt_len:])
    return inputs, labels


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, task: Task, num_problems: int) -> float:
    """Share of held-out problems that the model answers exactly by greedy decoding. Equal prompt lengths: no padding."""
    problems = task.heldout_problems(num_problems)
    prompts = torch.tensor([task.encode_prompt(problem) for problem in problems])
    tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
    rewards = task.reward(problems, task.decode_completions(tokens[:, prompts.shape[1] :].tolist()))
    return sum(reward or 0.0 for reward in rewards) / len(rewards)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """Write the checkpoint and the tokenizer; returns the sha256 of the weights file."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
