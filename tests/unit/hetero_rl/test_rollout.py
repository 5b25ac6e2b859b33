"""From responses to training sequences: what is dropped, what is counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deploy_targets.errors import EngineError
from deploy_targets.types import Generation, Sampling
from hetero_rl.config import LoopConfig
from hetero_rl.errors import RewardError
from hetero_rl.rollout import collect, sample, train_sequences
from hetero_rl.tasks.base import Problem
from hetero_rl.types import Rollouts


def rollouts(*rewards: float) -> Rollouts:
    generations = [
        Generation((1, 2), np.array([i], np.int32), np.array([-0.5], np.float32), weight_version=3, temperature=1.0, finish_reason="stop")
        for i in range(len(rewards))
    ]
    return Rollouts([Problem("p", "a")], generations, np.array([rewards], np.float32), weight_version=3)


def test_responses_without_a_reward_are_left_out() -> None:
    kept = train_sequences(rollouts(1.0, float("nan"), 0.0), np.array([[0.7, 0.0, -0.7]], np.float32))
    assert [(int(sequence.tokens[0]), sequence.advantage) for sequence in kept] == [(0, pytest.approx(0.7)), (2, pytest.approx(-0.7))]
    assert all(sequence.learner_old_logp is None for sequence in kept)


def test_no_reward_at_all_is_an_error() -> None:
    with pytest.raises(RewardError, match="None for all 2 responses"):
        train_sequences(rollouts(float("nan"), float("nan")), np.zeros((1, 2), np.float32))


class Counting:
    """Gives 1 to the responses of problems whose prompt is an odd number, in turns with 0; the others are flat."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def train_problems(self, step: int, num: int) -> list[Problem]:
        self.asked.append(step)
        return [Problem(str(len(self.asked) * 10 + i), "") for i in range(num)]

    def encode_prompt(self, problem: Problem) -> list[int]:
        return [int(problem.prompt)]

    def decode_completions(self, tokens: list[list[int]]) -> list[str]:
        return [str(row[0]) for row in tokens]

    def reward(self, problems: list[Problem], completions: list[str]) -> list[float]:
        return [float(int(problem.prompt) % 2 and i % 2) for i, problem in enumerate(problems)]


class Echo:
    """An engine that answers each prompt with its first token."""

    def generate(self, prompts: list[tuple[int, ...]], sampling: Sampling) -> list[Generation]:
        answer = np.array([0.0], np.float32)
        return [Generation(p, np.array([p[0]], np.int32), answer, weight_version=3, temperature=1.0, finish_reason="stop") for p in prompts]


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_flat_groups_are_replaced(rounds: int) -> None:
    """Of four problems two are flat, and of every draw of replacements the first is; each draw asks for other problems."""
    task, laps = Counting(), []
    loop = LoopConfig(prompts_per_step=4, samples_per_prompt=2, resample_rounds=rounds)
    found = collect(Echo(), task, Sampling(max_tokens=1), loop, 5, laps.append)  # type: ignore[arg-type]
    prompts = {0: [10, 11, 12, 13], 1: [20, 11, 21, 13], 3: [40, 11, 21, 13]}[rounds]
    assert [int(problem.prompt) for problem in found.problems] == prompts
    assert [generation.prompt[0] for generation in found.generations[::2]] == prompts
    assert found.rewards.tolist() == [[0.0, float(prompt % 2)] for prompt in prompts]
    assert found.flat_groups.tolist() == [prompt % 2 == 0 for prompt in prompts]
    assert found.num_replaced == {0: 0, 1: 2, 3: 4}[rounds]
    assert found.num_tokens == 8 + 2 * found.num_replaced
    assert len(set(task.asked)) == rounds + 1
    assert laps == ["perf/rollout_s", "perf/reward_s"] * (rounds + 1)


def test_responses_of_several_versions_are_no_batch() -> None:
    """No response is begun under one version and ended under another: each has one, and all of a batch have the same."""

    class Updated(Echo):
        def generate(self, prompts: list[tuple[int, ...]], sampling: Sampling) -> list[Generation]:
            *old, new = super().generate(prompts, sampling)
            return [*old, replace(new, weight_version=4)]

    task = Counting()
    with pytest.raises(EngineError, match=r"several weight versions: \[3, 4\]"):
        sample(Updated(), task, task.train_problems(0, 2), 2, Sampling(max_tokens=1))  # type: ignore[arg-type]
