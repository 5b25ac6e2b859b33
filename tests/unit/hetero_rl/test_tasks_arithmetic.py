"""Generated problems: right answers, the two sides, determinism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from transformers import AutoTokenizer

from hetero_rl.tasks import Task, load_task
from hetero_rl.tasks.arithmetic import is_heldout
from hetero_rl.tasks.config import ArithmeticConfig, DatasetConfig, RewardTerm, TaskConfig
from tests.models import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


def arithmetic(folder: Path, seed: int = 0, **options: object) -> Task:
    return load_task(ArithmeticConfig(**options), AutoTokenizer.from_pretrained(folder), seed)  # type: ignore[arg-type]


def test_answers_are_right_and_both_numbers_have_the_asked_digits(tokenizer_folder: Path) -> None:
    task = arithmetic(tokenizer_folder, operations=("+", "-", "*"), digits=2)
    problems = task.train_problems(0, 200)
    assert {problem.columns["operation"] for problem in problems} == {"+", "-", "*"}
    for problem in problems:
        assert isinstance(problem.prompt, str)
        assert int(problem.answer) == eval(problem.prompt.removesuffix("="))
        assert all(10 <= problem.columns[name] <= 99 for name in "ab")


def test_one_digit_includes_zero(tokenizer_folder: Path) -> None:
    drawn = {problem.columns["a"] for problem in arithmetic(tokenizer_folder, digits=1).train_problems(0, 500)}
    assert drawn == set(range(10))


def test_train_and_heldout_share_no_pair_in_either_order(tokenizer_folder: Path) -> None:
    task = arithmetic(tokenizer_folder, digits=2)

    def pairs(problems: list) -> set[frozenset[int]]:
        return {frozenset((problem.columns["a"], problem.columns["b"])) for problem in problems}

    train = pairs([problem for step in range(20) for problem in task.train_problems(step, 500)])
    heldout = pairs(task.heldout_problems(300))
    assert len(train) > 1000
    assert len(heldout) > 100
    assert not train & heldout


def test_heldout_share_is_one_in_ten() -> None:
    share = sum(is_heldout(a, "+", b) for a in range(100, 300) for b in range(100, 300)) / 200**2
    assert share == pytest.approx(0.1, abs=0.01)


def test_train_follows_from_seed_and_step(tokenizer_folder: Path) -> None:
    task = arithmetic(tokenizer_folder)
    assert task.train_problems(3, 16) == arithmetic(tokenizer_folder).train_problems(3, 16)
    assert task.train_problems(3, 16) != task.train_problems(4, 16)
    assert task.train_problems(3, 16) != arithmetic(tokenizer_folder, seed=1).train_problems(3, 16)


def test_heldout_is_fixed_distinct_and_grows_from_the_front(tokenizer_folder: Path) -> None:
    task = arithmetic(tokenizer_folder)
    problems = task.heldout_problems(300)
    assert problems == arithmetic(tokenizer_folder, seed=7).heldout_problems(300)
    assert problems[:40] == task.heldout_problems(40)
    assert len({problem.prompt for problem in problems}) == 300


def test_a_small_range_gives_all_its_heldout_problems(tokenizer_folder: Path) -> None:
    expected = {f"{a}+{b}=" for a in range(10) for b in range(10) if is_heldout(a, "+", b)}
    assert expected
    assert {problem.prompt for problem in arithmetic(tokenizer_folder, digits=1).heldout_problems(1000)} == expected


def test_another_process_draws_the_same(tokenizer_folder: Path) -> None:
    """Nothing depends on Python's hash seed."""
    code = (
        "from hetero_rl.tasks.arithmetic import ArithmeticTask\n"
        "task = ArithmeticTask(None, None, digits=3, operations='+*', seed=5)\n"
        "import sys; sys.stdout.write(repr([p.prompt for p in task.train_problems(2, 8) + task.heldout_problems(8)]))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        for seed in ("1", "2")
    ]
    task = arithmetic(tokenizer_folder, operations=("+", "*"), seed=5)
    expected = repr([problem.prompt for problem in task.train_problems(2, 8) + task.heldout_problems(8)])
    assert [output.stdout for output in outputs] == [expected, expected]


def test_reward_of_decoded_tokens(tokenizer_folder: Path) -> None:
    task = arithmetic(tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    problems = task.heldout_problems(2)
    right = [*tokenizer.encode(problems[0].answer), tokenizer.eos_token_id]
    wrong = [*tokenizer.encode(problems[1].answer), tokenizer.encode("0")[0]]
    texts = task.decode_completions([right, wrong])
    assert texts == [problems[0].answer, problems[1].answer + "0"]
    assert task.reward(problems, texts) == [1.0, 0.0]


def test_encode_prompt_is_the_tokenizers_encoding(tokenizer_folder: Path) -> None:
    task = arithmetic(tokenizer_folder)
    problem = task.train_problems(0, 1)[0]
    tokens = task.encode_prompt(problem)
    assert isinstance(tokens, tuple)
    assert len(tokens) == len(problem.prompt)
    assert task.decode_completions([tokens]) == [problem.prompt]


def test_config_is_a_union_by_type() -> None:
    adapter: TypeAdapter[TaskConfig] = TypeAdapter(TaskConfig)
    assert adapter.validate_python({"digits": 2}) == ArithmeticConfig(digits=2)
    config = adapter.validate_python({"type": "dataset", "path": "x.jsonl", "reward": [{"name": "numeric", "weight": 0.5}]})
    assert isinstance(config, DatasetConfig)
    assert config.reward_terms == (RewardTerm(name="numeric", weight=0.5),)
    assert adapter.validate_json(adapter.dump_json(config)) == config
    assert ArithmeticConfig(reward="digits").reward_terms == (RewardTerm(name="digits"),)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"digitz": 2}, "digitz"),
        ({"digits": 0}, "greater than or equal to 1"),
        ({"operations": ["/"]}, "operations"),
        ({"reward": []}, "at least one"),
        ({"type": "puzzles"}, "arithmetic"),
        ({"type": "dataset", "path": "a", "heldout_path": "b", "heldout_fraction": 0.1}, "exclude each other"),
        ({"type": "dataset", "path": "a", "heldout_split": "test"}, "needs heldout_path"),
    ],
)
def test_config_refuses(table: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TypeAdapter(TaskConfig).validate_python(table)
