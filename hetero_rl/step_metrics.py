"""From what a step returned to the line that is logged: names and formulas are those of `metrics.METRICS`."""

from __future__ import annotations

import time

import numpy as np

from hetero_rl.checkpoint import LoopState
from hetero_rl.learner.deepspeed_learner import UpdateStats
from hetero_rl.types import Rollouts

Row = dict[str, float]
"""Metric -> value, as `metrics.METRICS` has them."""


def first_row(state: LoopState) -> Row:
    """The line of step 0: what is known before any update."""
    return {
        "step": 0,
        "constraint/engine_gap": state.floor.mean,
        "constraint/floor": state.floor.mean,
        "constraint/tolerance": state.tolerance,
        "constraint/lambda": state.dual.multiplier,
        "engine/nonfinite_logprobs": state.floor.num_nonfinite,
        "weights/version": state.weight_version,
    }


def step_row(state: LoopState, rollouts: Rollouts, phases: Row, update: UpdateStats, multiplier: float) -> Row:
    """What is known of a step once the learner has taken it; what its publish, floor and evaluation say comes after."""
    sums, gap, rewards = update.sums, update.sums.gap, rollouts.rewards
    valid = rewards[np.isfinite(rewards)]
    lengths = [len(generation.tokens) for generation in rollouts.generations]
    return {
        "step": state.step,
        "reward/mean": float(valid.mean()) if len(valid) else float("nan"),
        "reward/std": float(valid.std()) if len(valid) else float("nan"),
        "reward/dropped": int(rewards.size - len(valid)),
        "reward/flat_groups": float(rollouts.flat_groups.mean()),
        "rollout/replaced_groups": rollouts.num_replaced,
        "rollout/tokens": rollouts.num_tokens,
        "rollout/response_tokens": float(np.mean(lengths)),
        "rollout/truncated": float(np.mean([generation.finish_reason == "length" for generation in rollouts.generations])),
        "constraint/engine_gap": gap.mean_engine_gap,
        "constraint/staleness_gap": gap.mean_staleness_gap,
        "constraint/kl_k3": gap.mean(gap.kl_k3),
        "constraint/floor": state.floor.mean,
        "constraint/tolerance": state.tolerance,
        "constraint/lambda": multiplier,
        "constraint/gap_ema": state.dual.gap_ema if state.dual.gap_ema is not None else float("nan"),
        "constraint/cost": sums.mean(sums.cost),
        "constraint/infeasible": int(state.dual.infeasible),
        "engine/nonfinite_logprobs": gap.num_nonfinite,
        "learner/policy_loss": sums.mean(sums.policy_loss),
        "learner/entropy": sums.mean(sums.entropy_nats),
        "learner/clip_fraction": sums.mean(sums.num_clipped),
        "learner/effective_share": sums.effective_share,
        "learner/router_agreement": sums.router_agreement,
        "learner/grad_norm": update.grad_norm,
        "learner/lr": update.lr,
        "learner/skipped_steps": update.num_skipped,
        "weights/version": rollouts.weight_version,
        "publish/proof_gap": float("nan"),
        "publish/rejected": 0,
        **phases,
        "perf/rollout_tokens_per_s": rollouts.num_tokens / phases["perf/rollout_s"],
    }


class Clock:
    """Seconds of a step, phase by phase."""

    def __init__(self, so_far: Row | None = None) -> None:
        """Start now, or go on with a step of which a resume finds these metrics."""
        spent = {name: value for name, value in (so_far or {}).items() if name.startswith("perf/")}
        self._last = time.perf_counter()
        self._start = self._last - spent.pop("perf/step_s", 0.0)
        self._laps = spent

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def row(self) -> Row:
        """All laps, and the whole step."""
        return {**self._laps, "perf/step_s": self._last - self._start}
