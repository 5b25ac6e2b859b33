"""Settings that were given and that another setting switches off: never ignored in silence."""

from __future__ import annotations

from collections.abc import Iterator

from hetero_rl.algorithm.kinds import PAIRED
from hetero_rl.config import RunConfig

CONTROLLER = ("lambda_min", "eta", "patience", "kp", "kd", "reward_window")


def unused_settings(config: RunConfig) -> Iterator[str]:
    """One sentence for each setting that the user gave and that has no effect beside the others."""
    algorithm, constraint, learner = config.algorithm, config.constraint, config.learner
    for name, useless in (("correction_low", ("none", "tis", "tis_sequence")), ("correction_high", ("none",))):
        if name in algorithm.model_fields_set and algorithm.correction in useless:
            yield f"algorithm.{name} has no effect: algorithm.correction is {algorithm.correction!r}"
    if constraint.signal == "off":
        for name in ("controller", "lambda_init", "lambda_max", *CONTROLLER):
            if name in constraint.model_fields_set:
                yield f"constraint.{name} has no effect: constraint.signal is 'off', so the gap is only measured"
    elif constraint.controller == "fixed":
        for name in CONTROLLER:
            if name in constraint.model_fields_set:
                yield f"constraint.{name} has no effect: constraint.controller is 'fixed', so lambda stays at lambda_init"
    elif constraint.controller == "dual":
        for name in ("kp", "kd"):
            if name in constraint.model_fields_set:
                yield f"constraint.{name} has no effect: constraint.controller is 'dual'"
    if constraint.signal not in PAIRED:
        for name in ("grey_box_form", "grey_box_share"):
            if name in constraint.model_fields_set:
                yield f"constraint.{name} has no effect: constraint.signal is {constraint.signal!r}"
    if constraint.signal != "advantage" and "advantage_form" in constraint.model_fields_set:
        yield f"constraint.advantage_form has no effect: constraint.signal is {constraint.signal!r}"
    if "tolerance_min" in constraint.model_fields_set and constraint.tolerance_unit == "absolute":
        yield "constraint.tolerance_min has no effect: constraint.tolerance_unit is 'absolute'"
    if constraint.floor_every and constraint.tolerance_unit == "absolute":
        yield "constraint.floor_every moves no bound: constraint.tolerance_unit is 'absolute'"
    num_updates = config.loop.num_steps * learner.updates_per_rollout
    if "warmup_steps" in learner.model_fields_set and learner.warmup_steps > num_updates:
        yield f"learner.lr is never reached: learner.warmup_steps is {learner.warmup_steps}, the run takes {num_updates} optimizer steps"
    for name in config.pool.model_fields_set if not config.engines else ():
        yield f"pool.{name} has no effect: there are no [[engines]]"
    for name in config.ray.model_fields_set if not config.uses_ray else ():
        yield f"ray.{name} has no effect: learner.launcher is 'none' and no [[engines]] has placement = 'ray'"
