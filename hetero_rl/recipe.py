"""What a run is about to do, in one line: it is printed at its start."""

from __future__ import annotations

from hetero_rl.config import RunConfig


def recipe_line(config: RunConfig) -> str:
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
    form = f" ({constraint.grey_box_form})" if constraint.signal == "grey_box" else ""
    first = min(constraint.lambda_init, constraint.multiplier_cap)
    if constraint.controller == "fixed":
        return ", ".join([*parts, f"signal {constraint.signal}{form} with lambda {first:g}"])
    how = {"dual": "dual ascent", "pid": "a PID controller"}[constraint.controller]
    return ", ".join(
        [*parts, f"signal {constraint.signal}{form} with lambda by {how}, {first:g} at first and {constraint.multiplier_cap:g} at most"]
    )
