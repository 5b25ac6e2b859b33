"""The multiplier: projected dual ascent on the measured engine gap, and the end of it when it cannot succeed.

Maximise reward subject to gap <= tolerance. The Lagrangian's dual variable lambda follows the violation,

    lambda <- clip(lambda + eta * (EMA(gap) / tolerance - 1), 0, lambda_max),

the paper's update (arXiv 2606.08779) with the violation in units of the tolerance, so that eta means the same for every
target. Inside the tolerance lambda falls to 0 and learning is free. A constraint that cannot be met would push lambda up
for ever and let the penalty eat the reward; it is detected, reported, and lambda is held at a bounded value instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class DualConfig:
    """Constants of the controller."""

    tolerance: float
    """Bound on the mean abs(dp)."""
    eta: float
    """Step of the ascent per unit of relative violation."""
    lambda_max: float
    """Projection bound."""
    lambda_infeasible: float
    """Bound of lambda once the constraint was found infeasible; below `lambda_max`."""
    ema: float = 0.9
    """Decay of the average of the gap."""
    patience: int = 40
    """Steps at the cap with a gap that does not fall before the constraint counts as infeasible."""
    min_progress: float = 0.02
    """Relative fall of the averaged gap within `patience` steps that counts as progress."""
    ascent: bool = True
    """False keeps lambda fixed (a fixed penalty weight)."""


@dataclass(frozen=True, slots=True)
class DualState:
    """What the controller carries from step to step; it is part of a checkpoint."""

    multiplier: float
    """lambda."""
    gap_ema: float | None = None
    """Averaged engine gap; None before the first measurement."""
    steps_at_cap: int = 0
    """Consecutive steps at `lambda_max` in violation without progress."""
    gap_at_cap: float = 0.0
    """Averaged gap when `steps_at_cap` last began to count."""
    infeasible: bool = False
    """Whether the constraint was given up."""


def dual_step(state: DualState, engine_gap: float, config: DualConfig) -> DualState:
    """One step of projected dual ascent; `engine_gap` is the mean abs(dp) measured on the step's rollouts.

    A NaN gap (no finite engine log-prob in the whole batch) leaves the state as it is.
    """
    if engine_gap != engine_gap:
        return state
    gap_ema = engine_gap if state.gap_ema is None else config.ema * state.gap_ema + (1.0 - config.ema) * engine_gap
    state = replace(state, gap_ema=gap_ema)
    if not config.ascent:
        return state
    violation = gap_ema / config.tolerance - 1.0
    bound = config.lambda_infeasible if state.infeasible else config.lambda_max
    multiplier = min(max(state.multiplier + config.eta * violation, 0.0), bound)
    if state.infeasible:
        return replace(state, multiplier=multiplier)
    return _watch_cap(replace(state, multiplier=multiplier), violation, config)


def _watch_cap(state: DualState, violation: float, config: DualConfig) -> DualState:
    """Count the steps that lambda spends at its cap to no avail; give the constraint up when they are too many."""
    assert state.gap_ema is not None
    if violation <= 0.0 or state.multiplier < config.lambda_max:
        return replace(state, steps_at_cap=0)
    if state.steps_at_cap == 0 or state.gap_ema < (1.0 - config.min_progress) * state.gap_at_cap:
        return replace(state, steps_at_cap=1, gap_at_cap=state.gap_ema)
    if state.steps_at_cap < config.patience:
        return replace(state, steps_at_cap=state.steps_at_cap + 1)
    return replace(state, infeasible=True, multiplier=min(state.multiplier, config.lambda_infeasible))
