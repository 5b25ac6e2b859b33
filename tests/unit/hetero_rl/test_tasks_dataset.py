"""Datasets: sources, the held-out side, order, and every way a file can be wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deploy_targets.errors import EXIT_USAGE, UsageError
from hetero_rl.tasks import Task, load_task
from hetero_rl.tasks.base import encode_prompt
from hetero_rl.tasks.config import DatasetConfig
from tests.models import save_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message.role|length }}={{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>9={% endif %}"
)
ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "source": f"made{n % 2}"} for n in range(50)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "sums.jsonl", ROWS)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(tokenizer: PreTrainedTokenizerFast, path: Path | str, seed: int = 0, **options: Any) -> Task:
    return load_task(DatasetConfig(type="dataset", path=str(path), **options), tokenizer, seed)


def test_jsonl_parquet_and_saved_datasets_give_the_same_problems(tokenizer: PreTrainedTokenizerFast, source: Path, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "sums.parquet")
    plain = datasets.Dataset.from_list(ROWS)
    plain.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": plain, "tiny": plain.select(range(2))}).save_to_disk(tmp_path / "splits")
    reference = load(tokenizer, source)
    for other in (tmp_path / "sums.parquet", tmp_path / "plain", tmp_path / "splits"):
        task = load(tokenizer, other)
        assert task.train_problems(0, 60) == reference.train_problems(0, 60)
        assert task.heldout_problems(60) == reference.heldout_problems(60)
    problem = reference.train_problems(0, 1)[0]
    assert problem.answer == problem.columns["answer"]
    assert problem.columns["source"].startswith("made")
    tiny = load(tokenizer, tmp_path / "splits", split="tiny")
    assert {problem.prompt for problem in tiny.train_problems(0, 9) + tiny.heldout_problems(9)} == {"0+1=", "1+1="}


def test_every_epoch_takes_each_problem_once_in_its_own_order(tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    task = load(tokenizer, source, heldout_fraction=0.2)
    assert len(task.heldout_problems(100)) == 10
    # 40 problems, 16 a step: five steps are two epochs.
    prompts = [problem.prompt for step in range(5) for problem in task.train_problems(step, 16)]
    assert set(Counter(prompts[:40]).values()) == {1}
    assert sorted(prompts[:40]) == sorted(prompts[40:])
    assert prompts[:40] != prompts[40:]
    assert task.train_problems(1, 16) == load(tokenizer, source, heldout_fraction=0.2).train_problems(1, 16)
    assert task.train_problems(0, 16) != load(tokenizer, source, seed=1, heldout_fraction=0.2).train_problems(0, 16)


def test_heldout_shares_no_prompt_with_training_and_ignores_seed_and_order(
    tokenizer: PreTrainedTokenizerFast, source: Path, tmp_path: Path
) -> None:
    doubled = write_jsonl(tmp_path / "doubled.jsonl", ROWS[::-1] + ROWS)
    tasks = [load(tokenizer, source), load(tokenizer, source, seed=3), load(tokenizer, doubled)]
    heldout = [{problem.prompt for problem in task.heldout_problems(100)} for task in tasks]
    assert heldout[0] == heldout[1] == heldout[2]
    assert len(heldout[0]) == 5
    assert len(tasks[2].heldout_problems(100)) == 5
    for task in tasks:
        assert not heldout[0] & {problem.prompt for problem in task.train_problems(0, 100)}
    assert tasks[0].heldout_problems(2) == tasks[0].heldout_problems(5)[:2]


def test_heldout_path_keeps_its_order_and_leaves_training(tokenizer: PreTrainedTokenizerFast, source: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "test.jsonl", [*ROWS[:3], {"prompt": "8+8=", "answer": "16"}])
    with pytest.warns(UserWarning, match="left out 3 of 50 problems whose prompt is in"):
        task = load(tokenizer, source, heldout_path=str(other))
    assert [problem.prompt for problem in task.heldout_problems(9)] == ["0+1=", "1+1=", "2+1=", "8+8="]
    assert {problem.prompt for problem in task.train_problems(0, 47)} == {row["prompt"] for row in ROWS[3:]}
    with pytest.raises(UsageError, match="nothing is left to train on"):
        load(tokenizer, source, heldout_path=str(source))


def test_columns_by_other_names_and_number_answers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "1+1=", "solution": 2}, {"question": "1+2=", "solution": 3.5}])
    task = load(tokenizer, path, prompt_column="question", answer_column="solution", reward="numeric")
    problems = sorted(task.train_problems(0, 1) + task.heldout_problems(1), key=lambda problem: str(problem.prompt))
    assert [problem.answer for problem in problems] == ["2", "3.5"]
    assert [problem.columns for problem in problems] == [{"solution": 2, "answer": "2"}, {"solution": 3.5, "answer": "3.5"}]
    assert task.reward(problems, ["it is 2.0", "3"]) == [1.0, 0.0]


def test_long_prompts_are_left_out_with_a_warning(tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    with pytest.warns(UserWarning, match="left out 40 of 50 problems whose prompt is longer than max_prompt_tokens = 4"):
        task = load(tokenizer, source, max_prompt_tokens=4)
    assert {len(task.encode_prompt(problem)) for problem in task.train_problems(0, 20)} == {4}
    with pytest.raises(UsageError, match="all 50 prompts are longer"):
        load(tokenizer, source, max_prompt_tokens=3)


def test_messages_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.chat_template = CHAT_TEMPLATE
    system = {"role": "system", "content": "add"}
    rows = [{"prompt": [system, {"role": "user", "content": f"{n}+1="}], "answer": n + 1} for n in (1, 2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    for path in (write_jsonl(tmp_path / "chat.jsonl", rows), tmp_path / "chat.parquet"):
        task = load(chat, path)
        problem = task.train_problems(0, 1)[0]
        text = chat.decode(task.encode_prompt(problem))
        assert text == f"<bos>6=add<eos><bos>4={problem.prompt[1]['content']}<eos><bos>9="  # type: ignore[index]
        assert task.encode_prompt(problem).count(chat.bos_token_id) == 3
        assert task.reward([problem], [problem.answer]) == [1.0]


def test_text_skips_the_chat_template_and_messages_need_one(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.chat_template = CHAT_TEMPLATE
    assert encode_prompt(chat, "1+1=") == tuple(chat.encode("1+1="))
    with pytest.raises(UsageError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "1+1="}])
    with pytest.raises(UsageError, match="no tokens"):
        encode_prompt(tokenizer, "")


def test_user_rewards_do_without_answers_and_ragged_columns_are_none(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ragged_reward.py").write_text(
        "def has_hint(completions, hint, **columns):\n    return [float(h is not None) for h in hint]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "1", "hint": "x"}, {"prompt": "2"}])
    task = load(tokenizer, path, reward="ragged_reward:has_hint")
    problems = sorted(task.train_problems(0, 1) + task.heldout_problems(1), key=lambda problem: str(problem.prompt))
    assert task.reward(problems, ["", ""]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        ([{"promt": "1", "answer": "1"}], r"line 1: no column 'prompt'\. Did you mean 'promt'\? Columns there: promt, answer"),
        ([{"prompt": "1", "answer": "1"}, {"prompt": "1"}], r"line 2: no column 'answer'\. Columns there: prompt"),
        ([{"prompt": 5, "answer": "1"}], "line 1: prompt is int 5, not text or a list of chat messages"),
        ([{"prompt": "", "answer": "1"}], "line 1: prompt is empty"),
        ([{"prompt": [], "answer": "1"}], "line 1: prompt is empty"),
        ([{"prompt": ["1"], "answer": "1"}], "line 1: prompt has the message '1'"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], "each must be {role, content}"),
        ([{"prompt": "1", "answer": ["1"]}], "line 1: answer is list"),
        ([{"prompt": "1", "answer": True}], "line 1: answer is bool True"),
        ([{"prompt": "1", "answer": None}], "line 1: answer is empty"),
        ([["1", "1"]], "line 1 is a JSON list, not an object"),
        ([{"prompt": "1", "answer": "1"}], "it takes two to hold one out"),
    ],
)
def test_rows_that_cannot_be(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load(tokenizer, write_jsonl(tmp_path / "bad.jsonl", rows))
    assert caught.value.exit_code == EXIT_USAGE
    assert "bad.jsonl" in str(caught.value)


def test_sources_that_cannot_be(tokenizer: PreTrainedTokenizerFast, source: Path, tmp_path: Path) -> None:
    def refused(path: Path | str, said: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=said):
            load(tokenizer, path, **options)

    refused(tmp_path / "sum.jsonl", r"does not exist\. Did you mean .*sums\.jsonl")
    refused(tmp_path / "nowhere", "does not exist")
    refused(source, "a file and has no splits", split="train")
    refused(source, "no column 'promptly'. Did you mean 'prompt'", prompt_column="promptly")
    (tmp_path / "sums.csv").write_text("prompt,answer\n")
    refused(tmp_path / "sums.csv", r"unknown kind; \.jsonl and \.parquet")
    (tmp_path / "cut.jsonl").write_text('{"prompt": "1", "answer": "1"}\n\n{"prompt": \n')
    refused(tmp_path / "cut.jsonl", "line 3 is not JSON")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    refused(tmp_path / "latin.jsonl", "line 1 is not JSON")
    (tmp_path / "text.parquet").write_text("no")
    refused(tmp_path / "text.parquet", "cannot be read as Parquet")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no readable folder saved by `datasets`")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "plain")
    refused(tmp_path / "plain", "saved without splits", split="train")
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    refused(tmp_path / "splits", "no split 'train'; it has: dev")
    refused("nobody/no-such-dataset", "no readable file, folder or dataset of the hub")
