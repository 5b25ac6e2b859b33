"""Named recipes: the settings that a run begins with where nobody says otherwise, chosen by how coarse the target is (docs/evidence.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from deploy_targets.profile import TargetProfile

RecipeName = Literal["auto", "none", "plain", "guard", "grey_box", "rounded"]
FINE_BITS = 4
"""Weights of so many bits, rounded in groups or by channel, cost next to nothing in deployed accuracy (docs/evidence.md)."""


Tables = Mapping[str, Mapping[str, Any]]


class Recipe(NamedTuple):
    """A recipe: one line for people, and tables of a config."""

    what: str
    settings: Tables


GREY_BOX: Tables = {"constraint": {"signal": "grey_box", "grey_box_share": 0.34, "lambda_init": 0.3, "lambda_min": 0.3}}
"""The pull stays when the tolerance is met: it keeps the high-precision weights good too, and a third of the prompts is enough for it."""
ROUNDED: Tables = {**GREY_BOX, "learner": {"forward": "fake_quant"}}
"""What ships is what learns; the pull keeps the high-precision weights close to it, and the bound is on what is left: kernels, caches."""
GUARD: Tables = {"constraint": {"signal": "grey_box", "lambda_init": 0.0, "tolerance": 1.5}}
"""Half a floor of slack: at the floor itself the noise of a step would call the twin every other time."""
RECIPES: dict[RecipeName, Recipe] = {
    "none": Recipe("the defaults of every setting", {}),
    "plain": Recipe("the gap is measured and not bounded", {"constraint": {"signal": "off"}}),
    "guard": Recipe("the grey box acts when the gap is half again the floor", GUARD),
    "grey_box": Recipe("the grey box acts from the first step, on a third of the prompts in turns", GREY_BOX),
    "rounded": Recipe("the learner computes with the rounded weights, and the grey box keeps the others close to them", ROUNDED),
}


def choose(profile: TargetProfile) -> tuple[RecipeName, str]:
    """What `auto` stands for on this target, and why."""
    rounds_cache = str(profile.engine.options.get("kv_cache_dtype", "auto")).startswith("fp8")
    if profile.scheme.bits < FINE_BITS:
        return "rounded", f"{profile.scheme.bits}-bit weights cost what only training wins back"
    if rounds_cache:
        return "grey_box", "an FP8 cache costs what only training wins back"
    if profile.scheme.bits < 16:
        return "guard", f"{profile.scheme.bits}-bit weights cost little, and rollouts by the engine win that back by themselves"
    return "plain", "the target rounds nothing"


def recipe_settings(name: str, profile: TargetProfile, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of recipe `name`, to lie below `given`; a name that does not exist has none.

    A recipe belongs to its signal: who gives another one, or asks for what the rounded forward cannot be had with, gets none of it that
    would contradict. A lambda that stays has no bounds.
    """
    chosen = choose(profile)[0] if name == "auto" else name
    recipe = RECIPES.get(chosen)  # type: ignore[call-overload]
    if recipe is None:
        return {}
    above = {**profile.constraint, **_table(given, "constraint")}
    tables = {table: dict(values) for table, values in recipe.settings.items()}
    own = tables.get("constraint", {})
    if above.get("signal") not in (None, own.get("signal")):
        tables = {}
    elif above.get("controller") == "fixed":
        own.pop("lambda_min", None)
    if _table(given, "algorithm").get("score_centering"):
        tables.pop("learner", None)
    return tables


def _table(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table that the user gave; empty where it is none, which validation will say."""
    table = given.get(name)
    return table if isinstance(table, Mapping) else {}
