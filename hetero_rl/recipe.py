"""Named recipes: the settings that a run begins with where nobody says otherwise, chosen by how coarse the target is (docs/evidence.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from deploy_targets.profile import TargetProfile

RecipeName = Literal["auto", "none", "plain", "guard", "grey_box"]
FINE_BITS = 4
"""Weights of so many bits, rounded in groups or by channel, cost next to nothing in deployed accuracy (docs/evidence.md)."""


class Recipe(NamedTuple):
    """A recipe: one line for people, and tables of a config."""

    what: str
    settings: Mapping[str, Mapping[str, Any]]


GREY_BOX = {"constraint": {"signal": "grey_box", "grey_box_share": 0.34, "lambda_init": 0.3, "lambda_min": 0.3}}
"""The pull stays when the tolerance is met: it keeps the high-precision weights good too, and a third of the prompts is enough for it."""
GUARD = {"constraint": {"signal": "grey_box", "lambda_init": 0.0, "tolerance": 1.5}}
"""Half a floor of slack: at the floor itself the noise of a step would call the twin every other time."""
RECIPES: dict[RecipeName, Recipe] = {
    "none": Recipe("the defaults of every setting", {}),
    "plain": Recipe("the gap is measured and not bounded", {"constraint": {"signal": "off"}}),
    "guard": Recipe("the grey box acts when the gap is half again the floor", GUARD),
    "grey_box": Recipe("the grey box acts from the first step, on a third of the prompts in turns", GREY_BOX),
}


def choose(profile: TargetProfile) -> tuple[RecipeName, str]:
    """What `auto` stands for on this target, and why."""
    rounds_cache = str(profile.engine.options.get("kv_cache_dtype", "auto")).startswith("fp8")
    if profile.scheme.bits < FINE_BITS:
        return "grey_box", f"{profile.scheme.bits}-bit weights cost what only training wins back"
    if rounds_cache:
        return "grey_box", "an FP8 cache costs what only training wins back"
    if profile.scheme.bits < 16:
        return "guard", f"{profile.scheme.bits}-bit weights cost little, and rollouts by the engine win that back by themselves"
    return "plain", "the target rounds nothing"


def recipe_settings(name: str, profile: TargetProfile, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of recipe `name`, to lie below `given`; a name that does not exist has none.

    Numbers of `[constraint]` belong to a signal: who gives another one gets none of the recipe's. A lambda that stays has no bounds.
    """
    chosen = choose(profile)[0] if name == "auto" else name
    recipe = RECIPES.get(chosen)  # type: ignore[call-overload]
    if recipe is None:
        return {}
    constraint = given.get("constraint")
    above = {**profile.constraint, **(constraint if isinstance(constraint, Mapping) else {})}
    tables = {table: dict(values) for table, values in recipe.settings.items()}
    own = tables.get("constraint", {})
    if above.get("signal") not in (None, own.get("signal")):
        tables.pop("constraint", None)
    elif above.get("controller") == "fixed":
        own.pop("lambda_min", None)
    return tables
