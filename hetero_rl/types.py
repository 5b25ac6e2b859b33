"""What travels between the parts of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy_targets.types import TokenSequence

if TYPE_CHECKING:
    import numpy as np
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

    @property
    def num_tokens(self) -> int:
        """Sampled tokens in all responses."""
        return sum(len(generation.tokens) for generation in self.generations)

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
    learner's own (on-policy: the update takes them from its own forward pass).
    """

    prompt: tuple[int, ...]
    tokens: NDArray[np.int32]
    engine_logp: NDArray[np.float32]
    advantage: float
    learner_old_logp: NDArray[np.float32] | None = None

    @property
    def sequence(self) -> TokenSequence:
        """The prompt and the response, ready to be scored."""
        return TokenSequence((*self.prompt, *self.tokens.tolist()), len(self.prompt))
