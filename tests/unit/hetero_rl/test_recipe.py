"""Which recipe a target gets, what the user's settings make of it, and the lines that say so."""

from __future__ import annotations

import pytest

from deploy_targets.errors import ProfileError
from deploy_targets.profile import load_profile, shipped_profiles
from hetero_rl.config import load_config
from hetero_rl.recipe import RECIPES, choose
from hetero_rl.recipe_text import pieces, recipe_lines

PLAIN = "grpo advantages, ppo_clip loss, no engine correction"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([], f"{PLAIN}, signal grey_box (kl) with lambda by dual ascent, 0.3 at first, 0.3 at least and 4 at most"),
        (["recipe=none"], f"{PLAIN}, signal grey_box (kl) with lambda by dual ascent, 1 at first and 4 at most"),
        (["constraint.signal=off"], f"{PLAIN}, the gap measured and not bounded"),
        (["constraint.signal=loss"], f"{PLAIN}, signal loss with lambda by dual ascent, 0.3 at first and 0.3 at most"),
        (["constraint.controller=fixed", "constraint.lambda_init=0.5"], f"{PLAIN}, signal grey_box (kl) with lambda 0.5"),
        (
            ["algorithm.correction=tis", "algorithm.score_centering=true", "algorithm.advantage=rloo", "constraint.signal=off"],
            "rloo advantages, ppo_clip loss, engine correction tis, score centering, the gap measured and not bounded",
        ),
        (
            ["learner.forward=fake_quant", "constraint.controller=pid"],
            f"{PLAIN}, a learner that computes with the rounded weights, signal grey_box (kl) with lambda by a PID controller, 0.3 at "
            "first, 0.3 at least and 4 at most",
        ),
    ],
)
def test_what_it_says(settings: list[str], line: str) -> None:
    assert pieces(load_config([], settings, "int4-vllm-fp8kv")[0]) == line


@pytest.mark.parametrize(
    ("target", "recipe"),
    [
        ("q2_k-llamacpp", "rounded"),
        ("q3_k_s-llamacpp", "rounded"),
        ("int4-vllm-fp8kv", "grey_box"),
        ("int4-onnx", "guard"),
        ("nf4-transformers", "guard"),
        ("bf16-vllm-fp8kv", "grey_box"),
        ("fp8-vllm", "guard"),
        ("q8_0-llamacpp", "guard"),
        ("bf16-vllm", "plain"),
        ("fp32-onnx", "plain"),
    ],
)
def test_auto_goes_by_what_the_target_rounds(target: str, recipe: str) -> None:
    assert choose(load_profile(target))[0] == recipe
    config, profile = load_config([], [], target)
    for table, values in RECIPES[recipe].settings.items():
        for key, value in values.items():
            assert getattr(getattr(config, table), key) == value
    assert recipe_lines(config, profile)[0].startswith(f"recipe {recipe}, chosen for {target} because ")


def test_every_target_gets_a_recipe_that_exists() -> None:
    assert {choose(profile)[0] for profile in shipped_profiles().values()} <= RECIPES.keys()


def test_settings_win_over_the_recipe() -> None:
    assert load_config([], ["constraint.lambda_init=0.7"], "fp8-vllm")[0].constraint.lambda_init == 0.7
    config, profile = load_config([], ["constraint.signal=loss"], "fp8-vllm")
    assert (config.constraint.first_multiplier, config.constraint.tolerance) == (0.3, 1.0), "the numbers of a recipe belong to its signal"
    assert recipe_lines(config, profile)[0].endswith(": changed by settings of your own")
    named = load_config([], ["recipe=guard", "constraint.signal=grey_box"], "int4-onnx")[0].constraint
    assert named.first_multiplier == 0.0, "naming the recipe's own signal changes nothing"
    rounded = load_config([], ["constraint.signal=off"], "q2_k-llamacpp")[0]
    assert rounded.learner.forward == "bf16", "a recipe belongs to its signal"
    centred = load_config([], ["algorithm.score_centering=true"], "q2_k-llamacpp")[0]
    assert (centred.learner.forward, centred.constraint.lambda_min) == ("bf16", 0.3)
    assert load_config([], ["recipe=plain"], "int4-onnx")[0].constraint.signal == "off"
    fixed = load_config([], ["constraint.controller=fixed"], "q2_k-llamacpp")[0].constraint
    assert (fixed.first_multiplier, fixed.lambda_min) == (0.3, 0.0), "a lambda that stays has no bounds"
    assert load_config([], ["recipe=none", "constraint.signal=grey_box"], "int4-onnx")[0].constraint.first_multiplier == 1.0
    config, profile = load_config([], ["recipe=none"], "bf16-vllm")
    assert config.constraint.signal == "grey_box"
    assert recipe_lines(config, profile)[0] == "recipe none: the defaults of every setting"


def test_a_recipe_that_does_not_exist_lists_the_known() -> None:
    with pytest.raises(ProfileError) as caught:
        load_config([], ["recipe=best"])
    assert "recipe: Input should be 'auto', 'none', 'plain', 'guard', 'grey_box' or 'rounded' (got 'best')" in caught.value.offenders


def test_a_resumed_run_keeps_what_it_began_with() -> None:
    old, _ = load_config([], ["constraint.lambda_init=0.5"], "int4-onnx")
    assert load_config([], [], "fp8-vllm", base=old)[0].constraint == old.constraint


@pytest.mark.parametrize(
    "settings",
    [
        ["constraint.lambda_max=0.3"],
        ["constraint.signal=loss"],
        ["constraint.signal=off"],
        ["engines=[{count = 2}, {url = 'http://a:1', token_file = 't'}, {url = 'http://b:1', server = 'vllm'}]"],
        ["engines=[{placement = 'ray'}]", "learner.launcher=ray", "learner.num_ranks=2"],
        [],
    ],
)
def test_a_config_survives_its_own_file(settings: list[str]) -> None:
    """A run folder holds every setting, the unset ones too."""
    config, _ = load_config([], settings)
    assert type(config).model_validate_json(config.model_dump_json()) == config
