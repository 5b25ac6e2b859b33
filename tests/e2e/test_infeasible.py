"""A tolerance that cannot be met on a coarse grid: the run is told, and learns as if there were no constraint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hetero_rl.metrics import read_metrics
from tests.command_line import hetero_rl, with_settings

STEPS = 40
LAST = 10
"""Steps whose mean reward is compared."""
SETTINGS = (
    *(
        f"loop.num_steps={STEPS}",
        "loop.prompts_per_step=24",
        "loop.samples_per_prompt=8",
        "loop.max_response_tokens=8",
        "task.reward=exact",
    ),
    *(
        "learner.lr=2e-4",
        "learner.warmup_steps=5",
        f"evaluation.every_steps={STEPS}",
        "evaluation.num_problems=50",
        "evaluation.num_final_problems=50",
    ),
    f"checkpoint.every_steps={STEPS}",
)


def trained(folder: Path, *settings: str) -> tuple[str, list[dict[str, float]]]:
    done = hetero_rl("train", "--target", "q2_k-llamacpp", *with_settings(*SETTINGS, *settings), "--run-dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, read_metrics(folder)


@pytest.mark.slow
@pytest.mark.variant
def test_it_does_not_eat_the_reward(tmp_path: Path) -> None:
    """A fifth of the floor, by the signal that cannot lower the gap, pressed as hard as it may be from the first step on."""
    _, free = trained(tmp_path / "free", "constraint.signal=off")
    said, bound = trained(
        tmp_path / "bound", "constraint.signal=loss", "constraint.tolerance=0.2", "constraint.lambda_init=0.3", "constraint.patience=10"
    )
    assert "is not above the floor" in " ".join(said.split())
    assert "the constraint is infeasible: lambda" in " ".join(said.split())
    assert "Raise constraint.tolerance" in " ".join(said.split())
    assert "use constraint.signal = 'grey_box': signals that hold the engine constant" in " ".join(said.split())
    assert bound[-1]["constraint/infeasible"] == 1
    assert bound[-1]["constraint/lambda"] == 0.0, "a penalty that lowers no gap only eats the reward"
    rewards = [np.array([row["reward/mean"] for row in rows[1:]]) for rows in (free, bound)]
    noise = rewards[0][-LAST:].std() / np.sqrt(LAST) + rewards[1][-LAST:].std() / np.sqrt(LAST)
    assert rewards[1][-LAST:].mean() > rewards[0][-LAST:].mean() - 3 * noise
