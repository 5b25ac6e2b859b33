"""What an update minimises: policy loss plus lambda times the constraint's cost, over the tokens with a finite engine log-prob."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hetero_rl.algorithm import signals
from hetero_rl.algorithm.corrections import correction_weights, effective_share
from hetero_rl.algorithm.discrepancy import GapSums, Sums, split_gap
from hetero_rl.algorithm.losses import policy_loss
from hetero_rl.algorithm.segments import Segments
from hetero_rl.config import AlgorithmConfig, ConstraintConfig
from hetero_rl.learner.batching import MicroBatch
from hetero_rl.learner.policy import TokenStats
from hetero_rl.types import TrainSequence


@dataclass(frozen=True, slots=True)
class LossSums(Sums):
    """What an update minimised and saw, summed over tokens."""

    policy_loss: float = 0.0
    cost: float = 0.0
    entropy_nats: float = 0.0
    num_clipped: float = 0.0
    weights: float = 0.0
    squared_weights: float = 0.0
    agreeing_routers: float = 0.0
    num_routed: float = 0.0
    gap: GapSums = field(default_factory=GapSums)

    def mean(self, total: float) -> float:
        """`total` per token with a finite engine log-prob; NaN where there is none."""
        return self.gap.mean(total)

    @property
    def router_agreement(self) -> float:
        """Mean of `TokenStats.router_agreement` over the tokens that have one; NaN where none has."""
        return self.agreeing_routers / self.num_routed if self.num_routed else float("nan")

    @property
    def effective_share(self) -> float:
        """Effective sample size of the engine correction's weights, per token; see `corrections.effective_share`."""
        return effective_share(self.weights, self.squared_weights, self.gap.num_tokens)


def objective(
    stats: TokenStats,
    batch: MicroBatch,
    sequences: Sequence[TrainSequence],
    algorithm: AlgorithmConfig,
    constraint: ConstraintConfig,
    multiplier: float,
    cost_scale: float = 1.0,
) -> tuple[Tensor, LossSums]:
    """The sum over the tokens of `batch` of policy loss plus `multiplier` x `cost_scale` x cost, with gradient; and what is logged.

    `sequences` are those that the batch's `indices` count in; `stats` are the learner's for it.
    """
    device = stats.logp.device
    engine_logp = batch.flatten([sequence.engine_logp for sequence in sequences], device)
    advantage = batch.flatten([np.full(len(sequence.tokens), sequence.advantage) for sequence in sequences], device)
    scale = batch.flatten([np.full(len(sequence.tokens), sequence.loss_scale) for sequence in sequences], device)
    known = [sequence.learner_old_logp for sequence in sequences]
    old_logp = stats.logp.detach() if known[batch.indices[0]] is None else batch.flatten([a for a in known if a is not None], device)
    segments = Segments.of(batch.lengths, device)
    gap = split_gap(stats.logp.detach(), old_logp, engine_logp, segments, constraint.measure, constraint.aggregation)

    mask = torch.isfinite(engine_logp)
    engine_logp = torch.where(mask, engine_logp, old_logp)
    weight = correction_weights(algorithm.correction, old_logp, engine_logp, mask, segments, algorithm.correction_bounds)
    if constraint.signal == "advantage":
        own_cost = signals.advantage_cost(constraint.advantage_form, old_logp, engine_logp, mask, segments)
        group_cost = batch.flatten([np.full(len(sequence.tokens), sequence.group_cost) for sequence in sequences], device)
        advantage = signals.advantage_side(advantage, own_cost, group_cost, multiplier)
    each = (stats.logp, old_logp, engine_logp, advantage, weight)
    token_loss, clipped = policy_loss(algorithm.loss, *each, mask, segments, algorithm.clip)
    if stats.mean_score is not None:
        token_loss = token_loss + advantage * stats.mean_score

    def total(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum()

    reward_loss = total(scale * token_loss)
    cost = torch.zeros_like(reward_loss)
    if stats.twin_cost is not None:
        cost = cost_scale * total(stats.twin_cost)
    elif constraint.signal == "loss":
        cost = total(signals.loss_side_cost(stats.logp, engine_logp))
    with torch.no_grad():
        sums = LossSums(
            policy_loss=float(reward_loss),
            cost=float(cost),
            entropy_nats=float(total(stats.entropy)),
            num_clipped=float(total(clipped)),
            weights=float(weight.sum()),
            squared_weights=float(weight.square().sum()),
            agreeing_routers=0.0 if stats.router_agreement is None else float(total(stats.router_agreement)),
            num_routed=0.0 if stats.router_agreement is None else float(mask.sum()),
            gap=gap,
        )
    return reward_loss + multiplier * cost, sums
