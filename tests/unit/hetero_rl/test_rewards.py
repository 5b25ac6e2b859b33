"""Rewards: built-in values, users' functions, weighted sums, and what happens when one goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy_targets.errors import EXIT_FAILED, EXIT_USAGE, UnknownNameError, UsageError
from hetero_rl.errors import RewardError
from hetero_rl.tasks.base import Problem
from hetero_rl.tasks.config import RewardTerm
from hetero_rl.tasks.rewards import Reward, artifact_reward, digits, exact, load_reward, math_verify, numeric, reward_text

PROBLEMS = [Problem("1+1=", "2", {"answer": "2", "level": "easy"}), Problem("5+5=", "10", {"answer": "10", "level": "hard"})]


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Writes the test's parameter as a module outside the project; returns its name."""
    name = f"user_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(request.param)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def rewards(*names: str) -> Reward:
    return load_reward([RewardTerm(name=name) for name in names])


@pytest.mark.parametrize(("completion", "value"), [("579", 1), (" 579\n", 1), ("5790", 0), ("", 0), ("+579", 0)])
def test_exact(completion: str, value: float) -> None:
    assert exact(completion, "579") == value


@pytest.mark.parametrize(("completion", "value"), [("579", 1), ("578", 2 / 3), ("5790", 3 / 4), ("57", 2 / 3), ("", 0), ("957", 0)])
def test_digits(completion: str, value: float) -> None:
    assert digits(completion, "579") == pytest.approx(value)


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so it is 1,234.50.", "1234.5", 1),
        ("1234", "1,234", 1),
        ("12 apples, then 7", "7", 1),
        ("7, then 12 apples", "7", 0),
        ("-5", "5", 0),
        ("10-5", "5", 1),
        ("x = -5", "-5", 1),
        ("1e3", "1000", 1),
        ("0.5", ".50", 1),
        ("#### 72", "#### 72", 1),
        ("none", "7", 0),
        ("none", "none", 0),
        ("1e99999999999999999999", "7", 0),
    ],
)
def test_numeric(completion: str, answer: str, value: float) -> None:
    assert numeric(completion, answer) == value


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (r"so $\frac{1}{2}$", "1/2", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"the set is $\{2, 1\}$", r"$\{1,2\}$", 1),
        ("$x^2+2x+1$", "$(x+1)^2$", 1),
        ("579", "579", 1),
        ("578", "579", 0),
        ("no idea", "579", 0),
        ("", "579", 0),
    ],
)
def test_math_verify(completion: str, answer: str, value: float) -> None:
    assert math_verify(completion, answer) == value


def test_math_verify_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetero_rl.tasks.rewards.MATH_VERIFY_LIMIT_S", 1)
    assert math_verify("$9^{9^{9^{9}}}$", "7") == 0


def test_math_verify_in_another_thread_keeps_its_time_limit() -> None:
    """Rollouts made ahead are judged in a thread, where signals cannot be set."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(rewards("math_verify"), PROBLEMS, ["2", "$9^{9^{9^{9}}}$"]).result(120) == [1, 0]


@pytest.mark.parametrize("user_module", ["import time\ndef slow(completions, **columns):\n    time.sleep(60)\n"], indirect=True)
def test_a_function_that_hangs_is_given_up(user_module: str) -> None:
    reward = load_reward([RewardTerm(name=f"{user_module}:slow")], 0.1)
    with pytest.raises(RewardError, match=r"no answer within 0.1 s \(task.reward_timeout_s\)"):
        reward(PROBLEMS, ["2", "10"])


TWO_JUDGES = (
    "def fails(completions, **columns):\n    raise TimeoutError('judge')\n\n\ndef good(completions, **columns):\n    return [1, 0]\n"
)


@pytest.mark.parametrize("user_module", [TWO_JUDGES], indirect=True)
def test_a_deadline_changes_nothing_else(user_module: str) -> None:
    assert load_reward([RewardTerm(name=f"{user_module}:good")], 60)(PROBLEMS, ["2", "10"]) == [1, 0]
    with pytest.raises(RewardError, match="TimeoutError: judge"):
        load_reward([RewardTerm(name=f"{user_module}:fails")], 60)(PROBLEMS, ["2", "10"])


def test_weighted_sum_and_dropped_samples() -> None:
    reward = load_reward([RewardTerm(name="exact", weight=2.0), RewardTerm(name="digits", weight=-0.5)])
    assert reward(PROBLEMS, ["2", "11"]) == [1.5, -0.25]
    assert reward([], []) == []


@pytest.mark.parametrize(
    "user_module",
    [
        "import numpy\n"
        "def easy_only(prompts, completions, level, **columns):\n"
        "    assert prompts == ['1+1=', '5+5='] and columns == {'answer': ['2', '10']}\n"
        "    return [len(c) if l == 'easy' else None for c, l in zip(completions, level)]\n"
        "def array(completions, **columns):\n"
        "    return numpy.float32([0.5] * len(completions))\n"
        "def truth(completions, answer, **columns):\n"
        "    return [c == a for c, a in zip(completions, answer)]\n"
        "def nan(completions, **columns):\n"
        "    return [float('nan'), 1]\n"
    ],
    indirect=True,
)
def test_user_functions(user_module: str) -> None:
    assert rewards(f"{user_module}:easy_only")(PROBLEMS, ["123", "4"]) == [3.0, None]
    assert rewards(f"{user_module}:easy_only", "exact")(PROBLEMS, ["123", "10"]) == [3.0, 1.0]
    assert rewards(f"{user_module}:array")(PROBLEMS, ["", ""]) == [0.5, 0.5]
    assert rewards(f"{user_module}:truth")(PROBLEMS, ["2", "2"]) == [1.0, 0.0]
    assert not rewards(f"{user_module}:truth").needs_answers
    assert rewards(f"{user_module}:truth", "exact").needs_answers
    with pytest.warns(UserWarning, match="NaN for 1 of 2 completions"):
        assert rewards(f"{user_module}:nan")(PROBLEMS, ["", ""]) == [None, 1.0]


@pytest.mark.parametrize(
    "user_module",
    [
        "def shape(prompts, completions, **columns):\n"
        "    assert completions[0][0]['role'] == 'assistant'\n"
        "    return [len(prompts[0]), len(completions[0][0]['content'])]\n"
    ],
    indirect=True,
)
def test_chat_prompts_bring_chat_completions(user_module: str) -> None:
    problem = Problem(({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), "")
    assert rewards(f"{user_module}:shape")([problem, problem], ["four", "x"]) == [2.0, 4.0]


@pytest.mark.parametrize(
    "user_module",
    [
        "def raises(completions, **columns):\n    return [int(c) for c in completions]\n"
        "def short(completions, **columns):\n    return [1.0]\n"
        "def text(completions, **columns):\n    return ['good'] * len(completions)\n"
        "def infinite(completions, **columns):\n    return [float('inf')] * len(completions)\n"
        "def nothing(completions, **columns):\n    pass\n"
        "def scalar(completions, **columns):\n    return 1.0\n"
        "def strict(completions, answer):\n    return [1.0] * len(completions)\n"
        "async def later(completions, **columns):\n    return []\n"
        "value = 3\n"
    ],
    indirect=True,
)
def test_user_functions_that_go_wrong(user_module: str) -> None:
    def fails(name: str, *said: str) -> None:
        with pytest.raises(RewardError) as caught:
            rewards(f"{user_module}:{name}")(PROBLEMS, ["7", "seven"])
        assert caught.value.exit_code == EXIT_FAILED
        for text in (f"{user_module}:{name}", "prompt: ", "completion: ", *said):
            assert text in str(caught.value)

    fails("raises", "ValueError: invalid literal", f"{user_module}.py, line 2", "2 samples", "'1+1='")
    fails("short", "gave 1 numbers for 2 completions")
    fails("text", "gave 'good', not a finite number or None")
    fails("infinite", "gave inf")
    fails("nothing", "gave NoneType None, not a list")
    fails("scalar", "gave float 1.0, not a list")
    fails("strict", "unexpected keyword argument", "let it end in **columns", "answer, level")
    with pytest.raises(UsageError, match="async"):
        rewards(f"{user_module}:later")
    with pytest.raises(UnknownNameError, match=r"unknown function .*'raisez'\. Did you mean 'raises'"):
        rewards(f"{user_module}:raisez")
    with pytest.raises(UnknownNameError, match="'value'"):
        rewards(f"{user_module}:value")


@pytest.mark.parametrize("user_module", ["import no_such_package_at_all\n"], indirect=True)
def test_names_that_cannot_be_found(user_module: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown reward 'exakt'\. Did you mean 'exact'") as caught:
        rewards("exakt")
    assert caught.value.exit_code == EXIT_USAGE
    with pytest.raises(UsageError, match=r"'no_module_here' cannot be imported .*PYTHONPATH"):
        rewards("no_module_here:f")
    with pytest.raises(UsageError, match=r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_package_at_all'\)"):
        rewards(f"{user_module}:f")


@pytest.mark.parametrize("by", ["PYTHONPATH", "cwd"])
def test_a_fresh_process_finds_user_rewards_and_needs_no_torch(tmp_path: Path, by: str) -> None:
    (tmp_path / "outside.py").write_text("def length(completions, **columns):\n    return [len(c) for c in completions]\n")
    program = tmp_path / "bin" / "program.py"
    program.parent.mkdir()
    program.write_text(
        "import sys\n"
        "from hetero_rl.tasks.base import Problem\n"
        "from hetero_rl.tasks.config import RewardTerm\n"
        "from hetero_rl.tasks.rewards import load_reward\n"
        "reward = load_reward([RewardTerm(name='outside:length'), RewardTerm(name='exact')])\n"
        "heavy = [name for name in ('torch', 'transformers', 'datasets', 'pyarrow', 'math_verify') if name in sys.modules]\n"
        "sys.stdout.write(repr((reward([Problem('1', 'abc')], ['abc']), heavy)))\n"
    )
    root = Path(__file__).parents[3]
    paths = [str(root)] + ([str(tmp_path)] if by == "PYTHONPATH" else [])
    folder = tmp_path if by == "cwd" else tmp_path / "bin"
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "([4.0], [])"


def test_number_of_completions_must_match() -> None:
    with pytest.raises(ValueError, match="2 problems for 1 completions"):
        rewards("exact")(PROBLEMS, ["2"])


@pytest.mark.parametrize(
    "user_module",
    ["def is_chat(completions, **columns):\n    return [not isinstance(text, str) for text in completions]\n"],
    indirect=True,
)
def test_an_artifact_never_chooses_the_code_that_judges_it(user_module: str) -> None:
    assert artifact_reward(f"{user_module}:is_chat") is None
    assert artifact_reward(f"exact+{user_module}:is_chat") is None
    judge = artifact_reward("exact", f"{user_module}:is_chat")
    assert judge is not None
    chat = json.dumps([{"role": "user", "content": "1+1="}])
    assert judge([chat, "[1+1]=", "[1]"], ["2", "2", "2"], {"answer": ["2", "2", "2"]}) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ([("exact", 1.0)], "exact"),
        ([("exact", 2.0), ("digits", -0.5)], "2.0*exact+-0.5*digits"),
        ([("exact", 1e20), ("digits", 1.0)], "1e+20*exact+digits"),
    ],
)
def test_a_recorded_reward_judges_as_the_trained_one(terms: list[tuple[str, float]], text: str) -> None:
    trained = [RewardTerm(name=name, weight=weight) for name, weight in terms]
    assert reward_text(trained) == text
    judge = artifact_reward(text)
    assert judge is not None
    columns = {"answer": ["2", "10"], "level": ["easy", "hard"]}
    assert judge(["1+1=", "5+5="], ["2", "11"], columns) == load_reward(trained)(PROBLEMS, ["2", "11"])


def test_recorded_rewards_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="'two' is not a number"):
        artifact_reward("two*exact")
    with pytest.raises(UnknownNameError, match="unknown reward ''"):
        artifact_reward("exact+")
