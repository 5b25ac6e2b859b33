"""The line that says what a run is about to do."""

from __future__ import annotations

import pytest

from hetero_rl.config import load_config
from hetero_rl.recipe import recipe_line

PLAIN = "grpo advantages, ppo_clip loss, no engine correction"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([], f"{PLAIN}, signal grey_box (kl) with lambda by dual ascent, 1 at first and 4 at most"),
        (["constraint.signal=off"], f"{PLAIN}, the gap measured and not bounded"),
        (["constraint.signal=loss"], f"{PLAIN}, signal loss with lambda by dual ascent, 0.3 at first and 0.3 at most"),
        (["constraint.controller=fixed", "constraint.lambda_init=0.5"], f"{PLAIN}, signal grey_box (kl) with lambda 0.5"),
        (
            ["algorithm.correction=tis", "algorithm.score_centering=true", "algorithm.advantage=rloo", "constraint.signal=off"],
            "rloo advantages, ppo_clip loss, engine correction tis, score centering, the gap measured and not bounded",
        ),
        (
            ["learner.forward=fake_quant", "constraint.controller=pid"],
            f"{PLAIN}, a learner that computes with the rounded weights, signal grey_box (kl) with lambda by a PID controller, 1 at first "
            "and 4 at most",
        ),
    ],
)
def test_what_it_says(settings: list[str], line: str) -> None:
    assert recipe_line(load_config([], settings)[0]) == line
