"""What a run says at its start: which recipe it follows, why, and the pieces that come of it."""

from __future__ import annotations

from deploy_targets.profile import TargetProfile
from hetero_rl.algorithm.kinds import PAIRED
from hetero_rl.config import RunConfig
from hetero_rl.recipe import RECIPES, choose


def recipe_lines(config: RunConfig, profile: TargetProfile) -> list[str]:
    """What a run says at its start: the recipe and why, and the pieces that come of it and of the user's own settings."""
    chosen, because = config.recipe, ""
    if chosen == "auto":
        chosen, why = choose(profile)
        because = f", chosen for {profile.name} because {why}"
    settings = RECIPES[chosen].settings
    is_kept = all(getattr(getattr(config, table), key) == value for table, values in settings.items() for key, value in values.items())
    return [f"recipe {chosen}{because}: {RECIPES[chosen].what if is_kept else 'changed by settings of your own'}", pieces(config)]


def pieces(config: RunConfig) -> str:
    """The pieces of the method that `config` has chosen, those that are off included where one would look for them."""
    algorithm, constraint = config.algorithm, config.constraint
    parts = [f"{algorithm.advantage} advantages", f"{algorithm.loss} loss"]
    parts.append("no engine correction" if algorithm.correction == "none" else f"engine correction {algorithm.correction}")
    if algorithm.score_centering:
        parts.append("score centering")
    if algorithm.routing_replay:
        parts.append("routing replay")
    if config.learner.forward == "fake_quant":
        parts.append("a learner that computes with the rounded weights")
    if constraint.signal == "off":
        return ", ".join([*parts, "the gap measured and not bounded"])
    form = f" ({constraint.grey_box_form})" if constraint.signal in PAIRED else ""
    first = constraint.first_multiplier
    if constraint.controller == "fixed":
        return ", ".join([*parts, f"signal {constraint.signal}{form} with lambda {first:g}"])
    how = {"dual": "dual ascent", "pid": "a PID controller"}[constraint.controller]
    least = f", {constraint.lambda_min:g} at least" if constraint.lambda_min else ""
    bounds = f"{first:g} at first{least} and {constraint.multiplier_cap:g} at most"
    return ", ".join([*parts, f"signal {constraint.signal}{form} with lambda by {how}, {bounds}"])
