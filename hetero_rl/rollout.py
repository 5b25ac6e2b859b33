"""Prompts in, rewarded responses out: what the engine samples, as tokens, with its own log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deploy_targets.errors import EngineError
from deploy_targets.paired import SOLVED
from deploy_targets.protocols import Engine
from deploy_targets.types import Generation, Sampling
from hetero_rl.config import LoopConfig
from hetero_rl.errors import RewardError
from hetero_rl.tasks.base import Problem, Task
from hetero_rl.types import Rollouts, TrainSequence

CALIBRATION_STEP, FLOOR_STEPS, RESAMPLING_STEPS = 999_999_999, 1_000_000_000, 2_000_000_000
"""Beyond every step of a run: what is sampled under them is not what a step samples."""


def collect(engine: Engine, task: Task, sampling: Sampling, loop: LoopConfig, step: int, lap: Callable[[str], None]) -> Rollouts:
    """The rollouts of one step; `lap` books the seconds of its phases.

    Groups whose rewards are all equal teach nothing. They are replaced by groups of other problems, up to `loop.resample_rounds`
    times (dynamic sampling, DAPO, arXiv 2503.14476), which favours problems that are sometimes solved.
    """

    def drawn(seed_step: int, num_problems: int) -> Rollouts:
        problems = task.train_problems(seed_step, loop.prompts_per_step)[:num_problems]
        generations = sample(engine, task, problems, loop.samples_per_prompt, seeded(sampling, loop.seed, seed_step))
        lap("perf/rollout_s")
        rollouts = rewarded(task, problems, generations, loop.samples_per_prompt)
        lap("perf/reward_s")
        return rollouts

    rollouts = drawn(step, loop.prompts_per_step)
    for again in range(loop.resample_rounds):
        flat = rollouts.flat_groups
        if not flat.any():
            break
        rollouts = rollouts.replaced(flat, drawn(RESAMPLING_STEPS + step * loop.resample_rounds + again, int(flat.sum())))
    return rollouts


def seeded(sampling: Sampling, seed: int, step: int) -> Sampling:
    """The sampling of one step: everything random in a run follows from (seed, step)."""
    return replace(sampling, seed=int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


def sample(engine: Engine, task: Task, problems: Sequence[Problem], group_size: int, sampling: Sampling) -> list[Generation]:
    """`group_size` responses per problem, neighbours sharing a prompt; all of one weight version.

    Raises `EngineError` when the engine does not give one response per prompt under one version.
    """
    prompts = [tuple(task.encode_prompt(problem)) for problem in problems]
    generations = engine.generate([prompt for prompt in prompts for _ in range(group_size)], sampling)
    if len(generations) != len(prompts) * group_size:
        raise EngineError(f"the engine gave {len(generations)} responses to {len(prompts) * group_size} requests")
    versions = {generation.weight_version for generation in generations}
    if len(versions) != 1:
        raise EngineError(f"one batch of responses came from several weight versions: {sorted(versions)}")
    return generations


def rewarded(task: Task, problems: Sequence[Problem], generations: Sequence[Generation], group_size: int) -> Rollouts:
    """Judge the responses: one reward each, NaN where the reward function gave None."""
    repeated = [problem for problem in problems for _ in range(group_size)]
    rewards = response_rewards(task, repeated, [generation.tokens for generation in generations]).reshape(len(problems), group_size)
    return Rollouts(list(problems), list(generations), rewards, generations[0].weight_version)


def accuracy(task: Task, problems: Sequence[Problem], responses: Sequence[Sequence[int] | NDArray[np.int32]]) -> float:
    """Share of `problems` whose response earns the full reward; problems without a reward are left out."""
    return solved_share(response_rewards(task, problems, responses))


def solved_share(rewards: NDArray[np.float32]) -> float:
    """Share of the full rewards among the finite ones; NaN where there is none."""
    judged = rewards[np.isfinite(rewards)]
    return float((judged >= SOLVED).mean()) if len(judged) else float("nan")


def train_sequences(rollouts: Rollouts, advantages: NDArray[np.float32]) -> list[TrainSequence]:
    """The responses that have a reward, with their advantage; the others teach nothing and are left out.

    Raises `RewardError` when none has one.
    """
    if not np.isfinite(rollouts.rewards).any():
        raise RewardError(
            f"the reward function gave None for all {rollouts.rewards.size} responses of the step; the first prompt was "
            f"{rollouts.problems[0].prompt!r}. Return a number for every response it can judge"
        )
    return [
        TrainSequence(generation.prompt, generation.tokens, generation.logps, float(advantage), routes=generation.routes)
        for generation, advantage, reward in zip(rollouts.generations, advantages.ravel(), rollouts.rewards.ravel(), strict=True)
        if np.isfinite(reward)
    ]


def response_rewards(
    task: Task, problems: Sequence[Problem], responses: Sequence[Sequence[int] | NDArray[np.int32]]
) -> NDArray[np.float32]:
    """Reward of each response, float32 [num_problems]; NaN where the reward function gave None."""
    rewards = task.reward(problems, task.decode_completions([list(map(int, response)) for response in responses]))
    return np.array([np.nan if reward is None else reward for reward in rewards], dtype=np.float32)
