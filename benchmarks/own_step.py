"""One training step of hetero-rl, phase by phase: the body of `hetero_rl.loop.train` without evaluation, metrics and checkpoints."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.models import profile_for
from deploy_targets.types import TokenSequence


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step: sizes, target and signal. Responses have no stop token, so each has exactly `max_tokens` tokens."""

    model_dir: Path
    target: str
    signal: str
    num_prompts: int
    group_size: int
    max_tokens: int
    num_threads: int


class OwnStep:
    """Learner and engine of a real run; each call takes one step and returns its seconds and counts."""

    def __init__(self, spec: StepSpec, serving: Path, stack: ExitStack) -> None:
        """Assemble the run's parts and measure the floor, as a run does before its first step."""
        import torch
        from rich.console import Console

        from hetero_rl.config import RunConfig
        from hetero_rl.floor import measure_start
        from hetero_rl.loop import controller
        from hetero_rl.parts import assemble
        from hetero_rl.view import View

        torch.set_num_threads(spec.num_threads)
        self.spec = spec
        self.config = RunConfig.model_validate(
            {
                "model": {"path": str(spec.model_dir)},
                "task": {"type": "arithmetic", "digits": 3, "reward": "digits"},
                "target": {"name": spec.target},
                "loop": {
                    "prompts_per_step": spec.num_prompts,
                    "samples_per_prompt": spec.group_size,
                    "max_response_tokens": spec.max_tokens,
                },
                # Held fixed, so that every measured step of a grey box has lambda > 0 and so runs the twin.
                "constraint": {"signal": spec.signal, "controller": "fixed", "lambda_init": 0.3, "floor_tokens": 64},
            }
        )
        view = View(Console(stderr=True, quiet=True))
        parts = assemble(self.config, profile_for(spec.target, spec.num_threads), serving, view, stack)
        self.parts = replace(parts, sampling=replace(parts.sampling, stop_token_ids=()))
        self.state = measure_start(self.config, self.parts)
        self._dual_config = controller(self.config, self.state.tolerance)

    def __call__(self) -> dict[str, float]:
        """Rollout, reward, update with the dual step, publish with its proof."""
        import torch

        from hetero_rl.algorithm.advantage import advantages
        from hetero_rl.algorithm.constraint import dual_step
        from hetero_rl.learner.batch_parts import split_batch
        from hetero_rl.rollout import rewarded, sample, seeded, train_sequences

        spec, state, parts = self.spec, self.state, self.parts
        learner, publisher, task = parts.learner, parts.publisher, parts.task
        start = time.perf_counter()
        problems = task.train_problems(state.step, spec.num_prompts)
        sampling = seeded(parts.sampling, self.config.loop.seed, state.step)
        generations = sample(publisher.engine, task, problems, spec.group_size, sampling)
        sampled = time.perf_counter()
        rollouts = rewarded(task, problems, generations, spec.group_size)
        judged = time.perf_counter()
        advantage = advantages(self.config.algorithm.advantage, torch.from_numpy(rollouts.rewards))
        rollout_sequences = train_sequences(rollouts, advantage.numpy())
        gap = learner.update(rollout_sequences, state.dual.multiplier).sums.gap
        dual = dual_step(state.dual, gap.mean_engine_gap, self._dual_config)
        learned = time.perf_counter()
        stats = publisher.publish(state.weight_version + 1)
        end = time.perf_counter()

        self.state = replace(state, step=state.step + 1, weight_version=state.weight_version + 1, dual=dual)
        # Responses without a gradient are only measured: a forward pass, where the others take three passes' worth.
        lm, parts = learner.policy.lm, split_batch(rollout_sequences, self.config.constraint, state.dual.multiplier, num_updates=0)
        taught, measured = ([s for part in parts if part.with_gradient is kind for s in part.sequences] for kind in (True, False))
        teaching, silent = (forward_flop(lm, [s.sequence for s in part]) for part in (taught, measured))
        prompt_tokens = sum(len(g.prompt) for g in generations)
        return {
            "step_s": end - start,
            "rollout_s": sampled - start,
            "reward_s": judged - sampled,
            "learner_s": learned - judged,
            "publish_s": end - learned,
            "quantize_s": stats.quantize_s,
            "swap_s": stats.swap_s,
            "proof_s": stats.proof_s,
            "num_rebuilds": publisher.num_rebuilds,
            "num_tokens": rollouts.num_tokens,
            "prompt_tokens": prompt_tokens,
            "share_with_gradient": len(taught) / len(rollout_sequences),
            "multiplier": state.dual.multiplier,
            "update_flop": (3 * teaching + silent) * (2 if spec.signal == "grey_box" else 1),
            "generate_flop": 2 * sum(matmul_parameters(lm)) * rollouts.num_tokens,
        }


def matmul_parameters(lm: Any) -> tuple[int, int]:
    """Weights that a token is multiplied with: those of the layers, and those of the output head."""
    from torch import nn

    head = lm.get_output_embeddings()
    body = sum(module.weight.numel() for module in lm.modules() if isinstance(module, nn.Linear) and module is not head)
    return body, head.weight.numel()


def forward_flop(lm: Any, sequences: list[TokenSequence]) -> int:
    """Useful FLOP of one teacher-forced forward pass: no padding counted, and each distinct prompt once.

    2 per weight and token (head: response tokens only) and, per layer, QK^T and AV over the causal half: 2 L^2 heads head_dim
    for a sequence of L tokens. The backward pass takes twice as much.
    """
    body, head = matmul_parameters(lm)
    config = lm.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = config.num_hidden_layers * 2 * width
    prompts = {sequence.tokens[: sequence.prompt_len] for sequence in sequences}
    flop = sum(2 * body * len(prompt) + attention * len(prompt) ** 2 for prompt in prompts)
    for sequence in sequences:
        length = len(sequence.tokens) - 1
        flop += 2 * body * (length - sequence.prompt_len) + 2 * head * (len(sequence.tokens) - sequence.prompt_len)
        flop += attention * (length**2 - sequence.prompt_len**2)
    return flop


def gemm_flop_per_s(quick: bool = False) -> float:
    """This machine's rate now: bf16 [4096, 1024] x [1024, 1024] by torch, with torch's current threads; median of ten."""
    import statistics

    import torch

    rows, inner, columns = (512 if quick else 4096), 1024, 1024
    left = torch.randn(rows, inner).bfloat16()
    right = torch.randn(inner, columns).bfloat16()
    times = []
    for _ in range(11):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / statistics.median(times[1:])
