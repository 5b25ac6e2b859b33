"""The multiplier: a controller on the measured engine gap, and the end of it when it cannot succeed.

Maximise reward subject to gap <= tolerance. The Lagrangian's dual variable lambda follows the violation in units of the
tolerance, so that the gains mean the same for every target:

    v      = EMA(gap) / tolerance - 1
    off    : lambda = 0
    fixed  : lambda stays
    dual   : lambda <- clip(lambda + eta v, least, bound)             projected dual ascent (arXiv 2606.08779, with least = 0)
    pid    : I      <- clip(I + eta v, least, bound), held while I + P + D alone reach the bound and v > 0 (anti-windup)
             lambda <- clip(I + P + D, least, bound),   P = kp v,   D = kd max(EMA(gap) - previous, 0) / tolerance

`pid` is Stooke et al., arXiv 2007.03964, algorithm 2, with the integral's gain eta folded into I and an upper bound. With
kp = kd = 0 it is `dual`. Against `dual`, P damps the swings that an integral alone makes, D acts before the bound is crossed.
Bias and variance: the average lags the gap by about ema / (1 - ema) steps and divides its variance by (1 + ema) / (1 - ema).

Inside the tolerance lambda falls to `least`: to 0, and learning is free, or to a pull that stays. A constraint that cannot
be met would push lambda up for ever and let the penalty eat the reward. So two watches bound it, for good, and say so:

- the gap did not fall in `patience` steps of violation, while lambda stood at its cap, or rose by `min_rise` of it with a violation
  of more than `min_violation` throughout: nearer than that the noise of floor and gap keeps a bound that is met in the end violated;
- (where `reward_window` > 0) lambda rose or stood at its bound over a window in which the averaged reward fell: halved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Controller = Literal["off", "fixed", "dual", "pid"]
Reason = Literal["", "cap", "rising", "reward"]


@dataclass(frozen=True, slots=True)
class DualConfig:
    """Constants of the controller."""

    tolerance: float
    """Bound on the mean discrepancy, in the unit of the gap (probability for abs(dp))."""
    eta: float
    """Step of the ascent, and gain of the PID's integral, per unit of relative violation."""
    lambda_max: float
    """Projection bound."""
    lambda_infeasible: float
    """Bound of lambda once the constraint was found infeasible; below `lambda_max`."""
    lambda_min: float = 0.0
    """Least lambda while the constraint stands."""
    ema: float = 0.9
    """Decay of the averages of gap and reward."""
    patience: int = 40
    """Steps in violation with a gap that does not fall before the constraint counts as infeasible."""
    min_progress: float = 0.02
    """Relative fall of the averaged gap that counts as progress and starts `patience` anew."""
    min_violation: float = 0.1
    """Relative violation up to which a lambda below its cap may go on rising."""
    controller: Controller = "dual"
    """What moves lambda."""
    kp: float = 0.0
    """`pid`: gain of the relative violation."""
    kd: float = 0.0
    """`pid`: gain of the step's rise of the averaged gap, in tolerances."""
    min_rise: float = 0.1
    """Rise of lambda, as a share of `lambda_max`, that must have been in vain below the cap."""
    reward_window: int = 0
    """Steps of the reward watch; 0 is no reward watch."""
    reward_drop: float = 0.05
    """Fall of the averaged reward within a window that counts as falling, in units of the reward."""


@dataclass(frozen=True, slots=True)
class DualState:
    """What the controller carries from step to step; it is part of a checkpoint."""

    multiplier: float
    """lambda."""
    gap_ema: float | None = None
    """Averaged engine gap; None before the first measurement."""
    infeasible: bool = False
    """Whether the constraint was given up."""
    integral: float | None = None
    """I of the PID, in units of lambda; None starts it at `multiplier`."""
    reason: Reason = ""
    """Which watch gave the constraint up."""
    bound: float | None = None
    """Upper bound of lambda since then; None is the config's."""
    watched_steps: int = 0
    """Consecutive steps in violation without progress of the gap."""
    watched_gap: float = 0.0
    """Averaged gap when `watched_steps` began to count."""
    watched_multiplier: float = 0.0
    """lambda at that time."""
    reward_ema: float | None = None
    """Averaged reward; None before the first."""
    window_steps: int = 0
    """Steps of the reward window so far."""
    window_reward: float = 0.0
    """Averaged reward when the window began."""
    window_multiplier: float = 0.0
    """lambda at that time."""


def dual_step(state: DualState, engine_gap: float, config: DualConfig, reward_mean: float | None = None) -> DualState:
    """One step of the controller.

    Args:
        state: After the step before.
        engine_gap: Mean discrepancy measured on the step's rollouts, engine part alone. Not finite (no finite engine log-prob
            in the whole batch): the state stays as it is.
        config: Constants.
        reward_mean: Mean reward of the same rollouts; needed where `config.reward_window` > 0. None or NaN: no new reward.

    Raises:
        ValueError: the config has a reward watch and no reward was given.
    """
    if config.reward_window > 0 and reward_mean is None:
        raise ValueError(f"reward_window = {config.reward_window} needs the step's mean reward: pass reward_mean to dual_step")
    if not math.isfinite(engine_gap):
        return state
    gap_before, gap_ema = state.gap_ema, _average(state.gap_ema, engine_gap, config.ema)
    state = replace(state, gap_ema=gap_ema)
    if config.controller == "off":
        return replace(state, multiplier=0.0)
    if config.controller == "fixed":
        return state
    violation = gap_ema / config.tolerance - 1.0
    rise = 0.0 if gap_before is None else max(gap_ema - gap_before, 0.0) / config.tolerance
    state = _controlled(state, violation, rise, config)
    return _watch_reward(_watch_gap(state, violation, config), reward_mean, config)


def infeasible_message(state: DualState, config: DualConfig, floor: float | None = None) -> str:
    """What a user reads when the constraint was given up: what was seen, what was done, what to change; "" while it stands.

    `floor` is the gap of the same weights on both machines, in the unit of the tolerance.
    """
    if not state.infeasible:
        return ""
    gap = "unknown" if state.gap_ema is None else f"{state.gap_ema:.4f}"
    numbers = f"{gap}; tolerance {config.tolerance:.4f}" + ("" if floor is None else f"; floor {floor:.4f}")
    seen = {
        "cap": f"lambda reached its cap and the engine gap ({numbers}) did not fall in {config.patience} steps",
        "rising": f"lambda kept rising and the engine gap ({numbers}) did not fall in {config.patience} steps",
        "reward": f"lambda rose and the reward fell over {config.reward_window} steps (engine gap {numbers})",
    }.get(state.reason, f"the engine gap ({numbers}) did not fall")
    if state.reason == "reward":
        change = "Lower constraint.lambda_max or constraint.eta, or raise constraint.tolerance"
    else:
        change = "Raise constraint.tolerance, or choose a target with a finer grid"
        if config.lambda_infeasible == 0.0:
            change += ", or use constraint.signal = 'grey_box': signals that hold the engine constant do not bring the gap below the floor"
    bound = _bound(state, config)
    held = f"lambda is held at or below {bound:g}" if bound > 0.0 else "lambda is 0"
    return f"the constraint is infeasible: {seen}. {held} from here on. {change}"


def _controlled(state: DualState, violation: float, rise: float, config: DualConfig) -> DualState:
    """The new lambda; dual ascent is the PID without P and D."""
    bound = _bound(state, config)
    least = min(config.lambda_min, bound)
    kp, kd = (config.kp, config.kd) if config.controller == "pid" else (0.0, 0.0)
    push = kp * violation + kd * rise
    integral = state.multiplier if state.integral is None or config.controller != "pid" else min(state.integral, bound)
    if violation <= 0.0 or integral + push < bound:
        integral = min(max(integral + config.eta * violation, least), bound)
    multiplier = min(max(integral + push, least), bound)
    return replace(state, multiplier=multiplier, integral=integral if config.controller == "pid" else None)


def _watch_gap(state: DualState, violation: float, config: DualConfig) -> DualState:
    """Count the steps in violation that lambda spends to no avail; give the constraint up when they are too many."""
    assert state.gap_ema is not None
    near = violation <= (0.0 if state.multiplier >= config.lambda_max else config.min_violation)
    if state.infeasible or near:
        return replace(state, watched_steps=0)
    if state.watched_steps == 0 or state.gap_ema < (1.0 - config.min_progress) * state.watched_gap:
        return replace(state, watched_steps=1, watched_gap=state.gap_ema, watched_multiplier=state.multiplier)
    if state.watched_steps < config.patience:
        return replace(state, watched_steps=state.watched_steps + 1)
    if state.multiplier >= config.lambda_max:
        return _give_up(state, "cap", config.lambda_infeasible)
    if state.multiplier - state.watched_multiplier >= config.min_rise * config.lambda_max:
        return _give_up(state, "rising", min(state.multiplier, config.lambda_infeasible))
    return state


def _watch_reward(state: DualState, reward_mean: float | None, config: DualConfig) -> DualState:
    """Halve lambda where it rose, or pressed on its bound, over a window in which the averaged reward fell."""
    if config.reward_window == 0 or reward_mean is None or not math.isfinite(reward_mean):
        return state
    reward = _average(state.reward_ema, reward_mean, config.ema)
    state = replace(state, reward_ema=reward, window_steps=state.window_steps + 1)
    if state.window_steps > config.reward_window:
        pressed = state.multiplier > state.window_multiplier or state.multiplier >= _bound(state, config)
        if pressed and state.multiplier > 0.0 and reward < state.window_reward - config.reward_drop:
            state = _give_up(state, "reward", state.multiplier / 2)
    elif state.window_steps > 1:
        return state
    return replace(state, window_steps=1, window_reward=reward, window_multiplier=state.multiplier)


def _give_up(state: DualState, reason: Reason, bound: float) -> DualState:
    return replace(state, infeasible=True, reason=reason, bound=bound, multiplier=min(state.multiplier, bound), watched_steps=0)


def _bound(state: DualState, config: DualConfig) -> float:
    """Upper bound of lambda."""
    if not state.infeasible:
        return config.lambda_max
    return config.lambda_infeasible if state.bound is None else state.bound


def _average(average: float | None, value: float, decay: float) -> float:
    return value if average is None else decay * average + (1.0 - decay) * value
