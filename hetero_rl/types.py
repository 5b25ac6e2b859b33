"""What travels between the parts of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploy_targets.types import TokenSequence

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy_targets.types import Generation
    from hetero_rl.tasks.base import Problem


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The responses of one step, group by group: sample j of problem i is entry i * group_size + j.

    `rewards`: float32 [num_prompts, group_size], NaN where the reward function gave none.
    """

    problems: list[Problem]
    generations: list[Generation]
    rewards: NDArray[np.float32]
    weight_version: int
    num_replaced: int = 0
    """Groups that were sampled and then replaced."""
    num_replaced_tokens: int = 0
    """Tokens of their responses."""

    @property
    def sequences(self) -> list[TokenSequence]:
        """Prompt and response of each generation."""
        return [generation.sequence for generation in self.generations]

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, those of replaced groups included."""
        return self.num_replaced_tokens + sum(len(generation.tokens) for generation in self.generations)

    @property
    def flat_groups(self) -> NDArray[np.bool_]:
        """Which groups have no two different rewards: bool [num_prompts]."""
        return np.array([len(set(group[np.isfinite(group)].tolist())) < 2 for group in self.rewards])

    def replaced(self, which: NDArray[np.bool_], others: Rollouts) -> Rollouts:
        """The groups `which`, bool [num_prompts], in their order replaced by those of `others`."""
        size = self.rewards.shape[1]
        problems, generations, rewards = list(self.problems), list(self.generations), self.rewards.copy()
        num_tokens = 0
        for new, old in enumerate(np.flatnonzero(which).tolist()):
            num_tokens += sum(len(generation.tokens) for generation in generations[old * size : (old + 1) * size])
            problems[old], rewards[old] = others.problems[new], others.rewards[new]
            generations[old * size : (old + 1) * size] = others.generations[new * size : (new + 1) * size]
        num_replaced, num_tokens = self.num_replaced + int(which.sum()), self.num_replaced_tokens + num_tokens
        return Rollouts(problems, generations, rewards, self.weight_version, num_replaced, num_tokens)

    @property
    def mean_reward(self) -> float:
        """Mean of the rewards that were given; NaN when none was."""
        given = self.rewards[self.rewards == self.rewards]
        return float(given.mean()) if len(given) else float("nan")


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One response with all that its loss needs.

    `tokens`: int32 [num_tokens]; `engine_logp`: float32 [num_tokens], NaN where the engine gave none; `learner_old_logp`:
    float32 [num_tokens], the learner's log-probs under the weights the engine served, or None when those are still the
    learner's own (on-policy: the update takes them from its own forward pass). `loss_scale`: by what the policy loss of its tokens
    counts (`losses.response_scales`). `routes`: as `Generation` has them. `group_cost`: what a centred advantage side takes from the
    cost of each token (`signals.group_costs`).
    """

    prompt: tuple[int, ...]
    tokens: NDArray[np.int32]
    engine_logp: NDArray[np.float32]
    advantage: float
    learner_old_logp: NDArray[np.float32] | None = None
    loss_scale: float = 1.0
    group_cost: float = 0.0
    routes: NDArray[np.int16] | None = None

    @property
    def sequence(self) -> TokenSequence:
        """The prompt and the response, ready to be scored."""
        return TokenSequence((*self.prompt, *self.tokens.tolist()), len(self.prompt))
