"""Settings that were given and that another setting switches off: never ignored in silence."""

from __future__ import annotations

from collections.abc import Iterator

from hetero_rl.config import RunConfig

CONTROLLER = ("eta", "patience")


def unused_settings(config: RunConfig) -> Iterator[str]:
    """One sentence for each setting that the user gave and that has no effect beside the others."""
    algorithm, constraint, learner = config.algorithm, config.constraint, config.learner
    if "tis_cap" in algorithm.model_fields_set and algorithm.correction != "tis":
        yield f"algorithm.tis_cap has no effect: algorithm.correction is {algorithm.correction!r}"
    if constraint.signal == "off":
        for name in ("controller", "lambda_init", "lambda_max", *CONTROLLER):
            if name in constraint.model_fields_set:
                yield f"constraint.{name} has no effect: constraint.signal is 'off', so the gap is only measured"
    elif constraint.controller == "fixed":
        for name in CONTROLLER:
            if name in constraint.model_fields_set:
                yield f"constraint.{name} has no effect: constraint.controller is 'fixed', so lambda stays at lambda_init"
    num_updates = config.loop.num_steps * learner.updates_per_rollout
    if "warmup_steps" in learner.model_fields_set and learner.warmup_steps > num_updates:
        yield f"learner.lr is never reached: learner.warmup_steps is {learner.warmup_steps}, the run takes {num_updates} optimizer steps"
