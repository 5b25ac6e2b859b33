"""`hetero-rl train --target T` and nothing else: the recipe of the target, said and followed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetero_rl.recipe import RECIPES, RecipeName
from tests.command_line import hetero_rl

PLAIN = "grpo advantages, ppo_clip loss, no engine correction"
DUAL = "signal grey_box (kl) with lambda by dual ascent"
ROUNDED = f"{PLAIN}, a learner that computes with the rounded weights"


@pytest.mark.parametrize(
    ("target", "recipe", "pieces"),
    [
        (
            "q2_k-llamacpp",
            "rounded",
            f"{ROUNDED}, {DUAL}, 0.3 at first, 0.3 at least and 4 at most",
        ),
        ("int4-onnx", "guard", f"{PLAIN}, {DUAL}, 0 at first and 4 at most"),
        ("fp32-onnx", "plain", f"{PLAIN}, the gap measured and not bounded"),
    ],
)
def test_the_shipped_recipe_is_used_and_printed(target: str, recipe: RecipeName, pieces: str, tmp_path: Path) -> None:
    """That a run which starts prints the same is asserted where one does (tests/e2e/test_train.py)."""
    result = hetero_rl("train", "--target", target, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config, said = json.JSONDecoder().raw_decode(result.stdout)
    for table, values in RECIPES[recipe].settings.items():
        assert {key: config[table][key] for key in values} == dict(values)
    first, second = result.stdout[said:].strip().splitlines()[:2]
    assert first.startswith(f"recipe {recipe}, chosen for {target} because ")
    assert first.endswith(f": {RECIPES[recipe].what}")
    assert second == pieces
