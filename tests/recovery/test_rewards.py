"""A reward function that raises, hangs or gives what is no number, in the middle of a real run: nothing of what was done is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetero_rl.metrics import read_metrics
from tests.command_line import with_settings
from tests.plugins import python_path
from tests.recovery.conftest import LONGEST_RUN_S, NUM_FAULTS, Undisturbed, faults, is_undisturbed, start, train, undisturbed_run

pytestmark = pytest.mark.timeout(1800)
MODULE = """
import os, time
calls = 0


def judge(prompts, completions, answer, **columns):
    global calls
    calls += 1
    rewards = [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]
    fault = os.environ.get("REWARD_FAULT")
    if calls < (7 if fault == "all NaN" else 5):
        fault = None
    if fault == "raises":
        raise ConnectionError("judge is down")
    if fault == "ends the process":
        raise SystemExit(3)
    if fault == "hangs":
        time.sleep(10_000)
    if fault == "all NaN":
        return [float("nan")] * len(rewards)
    if fault == "a third NaN":
        return [float("nan") if i % 3 == 0 else r for i, r in enumerate(rewards)]
    if fault == "infinite":
        return [float("inf")] * len(rewards)
    if fault == "too few":
        return rewards[1:]
    if fault == "text":
        return ["good"] * len(rewards)
    return rewards
"""
SAYS = {
    "raises": "judge is down", "hangs": "no answer within", "all NaN": "None for all", "infinite": "not a finite number",
    "too few": "numbers for", "text": "not a finite number", "ends the process": "SystemExit",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reward's module and its problems."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "my_rewards.py").write_text(MODULE)
    problems = "".join(json.dumps({"prompt": f"{a}+{a}=", "answer": str(2 * a)}) + "\n" for a in range(100, 400))
    (folder / "problems.jsonl").write_text(problems)
    return folder


def command(place: Path) -> list[str]:
    task = with_settings("task.type=dataset", f"task.path={place / 'problems.jsonl'}", "task.reward=my_rewards:judge")
    return [*train(), *task, *with_settings("task.reward_timeout_s=10")]


@pytest.fixture(scope="module")
def rewarded(place: Path) -> Undisturbed:
    return undisturbed_run(place, *command(place))


@pytest.mark.parametrize("fault", faults(["raises"] if NUM_FAULTS < 10 else SAYS, "reward function: {}"))
def test_the_run_ends_with_one_error_and_goes_on_where_it_was(fault: str, place: Path, rewarded: Undisturbed, tmp_path: Path) -> None:
    """Four calls are honest: two of the first evaluation, two of steps; the next two are an evaluation, which may be of no number."""
    environment = {"PYTHONPATH": python_path(place)}
    process = start(tmp_path, command(place), **environment, REWARD_FAULT=fault)
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 1, out
    assert "Traceback" not in out, out
    assert SAYS[fault] in out, out
    out, _ = start(tmp_path, [], **environment).communicate(timeout=LONGEST_RUN_S)
    assert is_undisturbed(tmp_path / "run", rewarded), out


@pytest.mark.fault("reward function: NaN for a third of the responses")
def test_responses_without_a_reward_are_left_out(place: Path, tmp_path: Path) -> None:
    process = start(tmp_path, command(place), PYTHONPATH=python_path(place), REWARD_FAULT="a third NaN")
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 0, out
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["reward/mean"] is not None and row["learner/grad_norm"] is not None for row in rows[1:])
    assert "NaN for" in out
