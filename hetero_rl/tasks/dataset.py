"""Prompts and answers from a JSONL or Parquet file, a folder saved by `datasets`, or the hub.

All problems are read and checked before the first step and held in memory.
"""

from __future__ import annotations

import difflib
import json
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from deploy_targets.errors import MissingPackageError, UsageError
from hetero_rl.tasks.base import Message, Problem, Task, Tokenizer, encode_prompt
from hetero_rl.tasks.config import DatasetConfig
from hetero_rl.tasks.rewards import Reward

DEFAULT_HELDOUT_FRACTION = 0.1
"""Share of the distinct prompts kept aside when the config names neither a fraction nor a source."""

FILE_SUFFIXES = (".jsonl", ".parquet")


class DatasetTask(Task):
    """Problems of a fixed list: each epoch in its own order, one after the other."""

    def __init__(self, tokenizer: Tokenizer, reward: Reward, train: Sequence[Problem], heldout: Sequence[Problem], seed: int) -> None:
        """`train` and `heldout` share no prompt; `seed` gives the order of training."""
        super().__init__(tokenizer, reward)
        self._train = list(train)
        self._heldout = list(heldout)
        self._seed = seed

    def train_problems(self, step: int, num: int) -> list[Problem]:
        """Problems step * num to (step + 1) * num of the endless sequence of epochs."""
        first = step * num
        orders: dict[int, list[int]] = {}
        problems = []
        for position in range(first, first + num):
            epoch, index = divmod(position, len(self._train))
            if epoch not in orders:
                orders[epoch] = self._order(epoch)
            problems.append(self._train[orders[epoch][index]])
        return problems

    def heldout_problems(self, num: int) -> list[Problem]:
        """The first `num` held-out problems, or all of them when there are fewer."""
        return self._heldout[:num]

    def longest_prompt(self) -> int:
        """Of all problems, trained on or held out."""
        return max(len(self.encode_prompt(problem)) for problem in (*self._train, *self._heldout))

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._train)))
        random.Random(f"dataset/{self._seed}/{epoch}").shuffle(order)
        return order


def load_dataset_task(config: DatasetConfig, tokenizer: Tokenizer, reward: Reward, seed: int) -> DatasetTask:
    """Read the source of `config` and keep the held-out problems aside.

    Raises:
        UsageError: a source that is missing, empty or unreadable, a missing column, a row of a wrong type, or nothing
            left to train or to test on.
    """
    train = _problems(config, config.path, config.split, "train", tokenizer, reward)
    if config.heldout_path is None:
        train, heldout = _split_by_prompt(train, config.heldout_fraction or DEFAULT_HELDOUT_FRACTION, config.path)
    else:
        heldout = _problems(config, config.heldout_path, config.heldout_split, "test", tokenizer, reward)
        train = _without(train, heldout, config)
    return DatasetTask(tokenizer, reward, train, heldout, seed)


def _problems(
    config: DatasetConfig, path: str, split: str | None, default_split: str, tokenizer: Tokenizer, reward: Reward
) -> list[Problem]:
    rows = _read_rows(path, split, default_split)
    problems = [
        _problem(row, f"{path}, {place}", config.prompt_column, config.answer_column, needs_answer=reward.needs_answers)
        for place, row in rows
    ]
    if not problems:
        raise UsageError(f"dataset {path} has no rows")
    short = [problem for problem in problems if len(encode_prompt(tokenizer, problem.prompt)) <= config.max_prompt_tokens]
    if not short:
        raise UsageError(f"dataset {path}: all {len(problems)} prompts are longer than max_prompt_tokens = {config.max_prompt_tokens}")
    if len(short) < len(problems):
        warnings.warn(
            f"dataset {path}: left out {len(problems) - len(short)} of {len(problems)} problems whose prompt is longer than "
            f"max_prompt_tokens = {config.max_prompt_tokens}",
            stacklevel=4,
        )
    return short


def _read_rows(path: str, split: str | None, default_split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for error messages, row) of every row."""
    source = Path(path).expanduser()
    if source.suffix in FILE_SUFFIXES or source.is_file():
        if source.suffix not in FILE_SUFFIXES:
            raise UsageError(f"dataset {path} is a file of an unknown kind; {' and '.join(FILE_SUFFIXES)} can be read")
        if split is not None:
            raise UsageError(f"dataset {path} is a file and has no splits; leave out split = {split!r}")
        if not source.is_file():
            near = difflib.get_close_matches(source.name, [entry.name for entry in source.parent.glob("*.*")], n=1)
            hint = f" Did you mean {source.parent / near[0]}?" if near else ""
            raise UsageError(f"dataset {path} does not exist.{hint}")
        yield from _read_jsonl(source) if source.suffix == ".jsonl" else _read_parquet(source)
        return
    if not source.is_dir() and (source.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1):
        raise UsageError(f"dataset {path} does not exist (a hub id is `name` or `owner/name`)")
    for index, row in enumerate(_load_with_datasets(path, source, split, default_split)):
        yield f"row {index}", row


def _read_jsonl(source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UsageError(f"dataset {source}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UsageError(f"dataset {source}, line {number} is a JSON {type(row).__name__}, not an object with columns")
            yield f"line {number}", row


def _read_parquet(source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingPackageError("pyarrow", "reading Parquet", "train") from None
    try:
        rows = parquet.read_table(source).to_pylist()
    except (OSError, ArrowException) as error:
        raise UsageError(f"dataset {source} cannot be read as Parquet: {error}") from None
    for index, row in enumerate(rows):
        yield f"row {index}", row


def _load_with_datasets(path: str, source: Path, split: str | None, default_split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise MissingPackageError("datasets", f"dataset {path}", "train") from None
    try:
        loaded = datasets.load_from_disk(str(source)) if source.is_dir() else datasets.load_dataset(path)
    except Exception as error:
        # Hub, file-format and network errors of several packages all end here.
        what = "folder saved by `datasets`" if source.is_dir() else "file, folder or dataset of the hub"
        raise UsageError(f"dataset {path} is no readable {what}: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, Mapping):
        if split is not None:
            raise UsageError(f"dataset {path} was saved without splits; leave out split = {split!r}")
        return loaded  # type: ignore[no-any-return]
    wanted = split or default_split
    if wanted not in loaded:
        raise UsageError(f"dataset {path} has no split {wanted!r}; it has: {', '.join(map(str, loaded))}")
    return loaded[wanted]  # type: ignore[no-any-return]


def _problem(row: Mapping[str, Any], place: str, prompt_column: str, answer_column: str, *, needs_answer: bool) -> Problem:
    for column in (prompt_column, answer_column) if needs_answer else (prompt_column,):
        if column not in row:
            near = difflib.get_close_matches(column, list(row), n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"dataset {place}: no column {column!r}.{hint} Columns there: {', '.join(row) or 'none'}")
    answer = row.get(answer_column)
    prompt = _prompt(row[prompt_column], f"dataset {place}: {prompt_column}")
    columns = {name: value for name, value in row.items() if name != prompt_column}
    if not isinstance(answer, bool) and isinstance(answer, str | int | float):
        columns["answer"] = str(answer)
        return Problem(prompt, str(answer), columns)
    if needs_answer:
        raise UsageError(f"dataset {place}: {answer_column} is {_kind(answer)}, not text or a number")
    return Problem(prompt, "", columns)


def _prompt(value: Any, place: str) -> str | tuple[Message, ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        for message in value:
            if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise UsageError(f"{place} has the message {message!r:.200}; each must be {{role, content}} with text in both")
        return tuple(value)
    raise UsageError(f"{place} is {_kind(value)}, not text or a list of chat messages {{role, content}}")


def _kind(value: Any) -> str:
    return f"empty ({value!r})" if value in ("", []) or value is None else f"{type(value).__name__} {value!r:.80}"


def _key(problem: Problem) -> str:
    """Two problems with the same key have the same prompt."""
    prompt = problem.prompt if isinstance(problem.prompt, str) else [dict(message) for message in problem.prompt]
    return blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=16).hexdigest()


def _split_by_prompt(problems: list[Problem], fraction: float, path: str) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out): the distinct prompts of lowest hash are held out, so that neither seed nor order matters."""
    keys = sorted({_key(problem) for problem in problems})
    if len(keys) < 2:
        raise UsageError(f"dataset {path} has {len(keys)} distinct prompt; it takes two to hold one out. Give heldout_path")
    num_heldout = min(math.ceil(fraction * len(keys)), len(keys) - 1)
    aside = set(keys[:num_heldout])
    train = [problem for problem in problems if _key(problem) not in aside]
    heldout = {key: problem for problem in problems if (key := _key(problem)) in aside}
    return train, [heldout[key] for key in sorted(heldout)]


def _without(train: list[Problem], heldout: list[Problem], config: DatasetConfig) -> list[Problem]:
    aside = {_key(problem) for problem in heldout}
    kept = [problem for problem in train if _key(problem) not in aside]
    if not kept:
        raise UsageError(f"dataset {config.path}: every prompt is in {config.heldout_path} too, so nothing is left to train on")
    if len(kept) < len(train):
        warnings.warn(
            f"dataset {config.path}: left out {len(train) - len(kept)} of {len(train)} problems whose prompt is in "
            f"{config.heldout_path} too",
            stacklevel=3,
        )
    return kept
