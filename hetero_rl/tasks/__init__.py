"""Prompts and verifiable rewards, one file per task family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero_rl.tasks.base import Problem, Task, Tokenizer

if TYPE_CHECKING:
    from hetero_rl.tasks.config import TaskConfig

__all__ = ["Problem", "Task", "Tokenizer", "load_task"]


def load_task(config: TaskConfig, tokenizer: Tokenizer, seed: int) -> Task:
    """The task that `config` describes; `seed` changes the training problems, never the held-out ones.

    Raises:
        UsageError: a reward, file, split or column that cannot be used; the message lists what there is.
    """
    from hetero_rl.tasks.arithmetic import ArithmeticTask
    from hetero_rl.tasks.dataset import load_dataset_task
    from hetero_rl.tasks.rewards import load_reward

    reward = load_reward(config.reward_terms, config.reward_timeout_s)
    if config.type == "arithmetic":
        return ArithmeticTask(tokenizer, reward, digits=config.digits, operations=config.operations, seed=seed)
    return load_dataset_task(config, tokenizer, reward, seed)
