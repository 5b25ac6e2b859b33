"""Verifiable rewards. Importing this needs neither torch nor transformers: the serving box computes them too.

Built-in, each a number per completion from (completion, answer):

    exact        1.0 where the completion is the answer, white space at both ends aside, else 0.0
    digits       share of the answer's characters that stand in their place, 1.0 only where nothing is missing or left over
    numeric      1.0 where the last number of the completion equals the answer: `1,234.50` equals `1234.5`, else 0.0
    math_verify  1.0 where the package math-verify holds them for the same mathematics (LaTeX, fractions, sets), else 0.0

Your own is `module:function`, found on PYTHONPATH or in the working directory, with the signature TRL gives to reward
functions: `fn(prompts, completions, **columns) -> list[float | None]`, all by keyword. Where the prompt is a list of chat
messages, so is the completion: `[{"role": "assistant", "content": ...}]`. The columns are those of the sample, except the
prompt and any called `prompts` or `completions`; `answer` is the right answer as text. None means "not for me".

Several are summed by weight over those that gave a number; a sample to which none gave one is dropped.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from multiprocessing import get_context
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

from deploy_targets.errors import MissingPackageError, UnknownNameError, UsageError
from hetero_rl.errors import RewardError
from hetero_rl.tasks.base import Problem

if TYPE_CHECKING:
    from hetero_rl.tasks.config import RewardTerm

MATH_VERIFY_LIMIT_S = 5
"""Time limit of each parse and each comparison of math-verify."""

BuiltIn: TypeAlias = Callable[[str, str], float]
ArtifactReward: TypeAlias = Callable[[list[str], list[str], dict[str, list[Any]]], list[float | None]]
"""(prompts, completions, columns) -> rewards: what `deploy_targets.verify` takes."""
_NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|(?:(?<!\d)[-+])?\.\d+")
_SHOWN_CHARACTERS = 500


def exact(completion: str, answer: str) -> float:
    """1.0 where both are the same text, white space at both ends aside."""
    return float(completion.strip() == answer.strip())


def digits(completion: str, answer: str) -> float:
    """Share of characters in their place, over the longer of the two texts: in [0, 1]."""
    given, right = completion.strip(), answer.strip()
    longest = max(len(given), len(right))
    return sum(a == b for a, b in zip(given, right, strict=False)) / longest if longest else 1.0


def numeric(completion: str, answer: str) -> float:
    """1.0 where the last number of the completion has the value of the answer's last number."""
    given, right = _last_number(completion), _last_number(answer)
    return float(given is not None and given == right)


def math_verify(completion: str, answer: str) -> float:
    """1.0 where math-verify holds both for the same; 0.0 where it differs, finds nothing, or runs out of its time limit."""
    if threading.current_thread() is not threading.main_thread():
        # Its limits are signal.alarm, which only a main thread can set; without them `9^{9^{9^{9}}}` would hang the run.
        return _another_main_thread().submit(math_verify, completion, answer).result()
    parse, verify = _math_verify_functions()
    # A plain answer such as 1/2 is LaTeX only between dollars; both readings are tried.
    right = parse(answer, parsing_timeout=MATH_VERIFY_LIMIT_S) or parse(f"${answer}$", parsing_timeout=MATH_VERIFY_LIMIT_S)
    given = parse(completion, parsing_timeout=MATH_VERIFY_LIMIT_S)
    return float(verify(right, given, timeout_seconds=MATH_VERIFY_LIMIT_S))


BUILT_IN: Mapping[str, BuiltIn] = {"exact": exact, "digits": digits, "numeric": numeric, "math_verify": math_verify}
"""Rewards by name."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A weighted sum of reward functions, ready to be called."""

    terms: tuple[tuple[str, float, Callable[..., Any]], ...]
    """(name, weight, function) of each term."""
    timeout_s: float | None = None
    """Seconds that a call of a user's function may take."""

    @property
    def needs_answers(self) -> bool:
        """Whether a built-in term compares with `Problem.answer`."""
        return any(name in BUILT_IN for name, _, _ in self.terms)

    def __call__(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[float | None]:
        """One reward per completion, None where no term gave a number; problem i belongs to completion i.

        Raises:
            RewardError: a function raised, took too long, or gave something other than one number or None per completion.
        """
        if len(problems) != len(completions):
            raise ValueError(f"{len(problems)} problems for {len(completions)} completions")
        if not problems:
            return []
        sums: list[float | None] = [None] * len(completions)
        for name, weight, function in self.terms:
            if name in BUILT_IN:
                values = _call_built_in(name, function, problems, completions)
            else:
                values = _call_user_function(name, function, problems, completions, self.timeout_s)
            for index, value in enumerate(values):
                if value is not None:
                    sums[index] = (sums[index] or 0.0) + weight * value
        return sums


def load_reward(terms: Sequence[RewardTerm], timeout_s: float | None = None) -> Reward:
    """Find the functions of all `terms`; a call of a user's own may take `timeout_s`.

    Raises:
        UnknownNameError: a name that is neither built-in nor `module:function`.
        MissingPackageError: `math_verify` without the package.
        UsageError: a module that cannot be imported, or has no such function, or an async one.
    """
    return Reward(tuple((term.name, term.weight, _find(term.name)) for term in terms), timeout_s)


def reward_text(terms: Sequence[RewardTerm]) -> str:
    """`terms` in one line, as an artifact records them: `exact`, `2*exact+0.5*digits`."""
    return "+".join(term.name if term.weight == 1 else f"{term.weight!r}*{term.name}" for term in terms)


def artifact_reward(recorded: str, override: str | None = None) -> ArtifactReward | None:
    """The reward for judging an artifact's task sample: `override` where given, else the `recorded` one.

    Both are written as by `reward_text`. None where `recorded` names code of a user and there is no `override`: an artifact
    must not choose what runs on the machine that checks it.

    Raises:
        UsageError: what `load_reward` raises, or a text that is not of that form.
    """
    if override is None and ":" in recorded:
        return None
    reward = load_reward(_parse_terms(override if override is not None else recorded))

    def judge(prompts: list[str], completions: list[str], columns: dict[str, list[Any]]) -> list[float | None]:
        rows = [{name: values[index] for name, values in columns.items()} for index in range(len(prompts))]
        problems = [Problem(_messages_or_text(prompt), str(row.get("answer", "")), row) for prompt, row in zip(prompts, rows, strict=True)]
        return reward(problems, completions)

    return judge


def _parse_terms(text: str) -> list[RewardTerm]:
    from hetero_rl.tasks.config import RewardTerm

    terms = []
    # A plus after an e is an exponent: 1e+20*exact.
    for part in re.split(r"(?<!\de)\+", text):
        weight, star, name = part.rpartition("*")
        try:
            terms.append(RewardTerm(name=name, weight=float(weight) if star else 1.0))
        except ValueError:
            raise UsageError(f"reward {text!r}: {weight!r} is not a number; write `name` or `weight*name`, joined by +") from None
    return terms


def _messages_or_text(prompt: str) -> str | tuple[Mapping[str, str], ...]:
    """Undo the JSON that chat messages are written as in a task sample."""
    if not prompt.startswith("["):
        return prompt
    try:
        messages = json.loads(prompt)
    except ValueError:
        return prompt
    is_chat = bool(messages) and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages)
    return tuple(messages) if is_chat else prompt


def _find(name: str) -> Callable[..., Any]:
    if ":" in name:
        return _import_user_function(name)
    if name not in BUILT_IN:
        raise UnknownNameError("reward", name, [*BUILT_IN, "your_module:your_function"])
    if name == "math_verify":
        _math_verify_functions()
    return BUILT_IN[name]


def _import_user_function(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        # At the end, so that nothing in the working directory hides an installed package.
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"reward {name!r}: the module {module_name!r} cannot be imported ({type(error).__name__}: {error}). "
            f"Put its folder on PYTHONPATH or start from there; searched: {', '.join(path or '.' for path in sys.path)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UnknownNameError(f"function of {module.__file__} as reward", function_name, functions)
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"reward {name!r} is async; give a plain function that returns a list of numbers")
    return function  # type: ignore[no-any-return]


def _call_built_in(name: str, function: BuiltIn, problems: Sequence[Problem], completions: Sequence[str]) -> list[float | None]:
    values: list[float | None] = []
    for problem, completion in zip(problems, completions, strict=True):
        try:
            values.append(function(completion, problem.answer))
        except Exception as error:
            raise RewardError(f"reward {name!r} failed with {_describe(error)}\n{_show(problem, completion)}") from error
    return values


def _call_user_function(
    name: str, function: Callable[..., Any], problems: Sequence[Problem], completions: Sequence[str], timeout_s: float | None
) -> list[float | None]:
    # Rows of a JSONL file need not all have the same columns.
    names = [key for key in dict.fromkeys(key for problem in problems for key in problem.columns) if key not in ("prompts", "completions")]
    columns = {key: [problem.columns.get(key) for problem in problems] for key in names}
    prompts = [problem.prompt if isinstance(problem.prompt, str) else [dict(message) for message in problem.prompt] for problem in problems]
    texts: list[Any] = [
        completion if isinstance(problem.prompt, str) else [{"role": "assistant", "content": completion}]
        for problem, completion in zip(problems, completions, strict=True)
    ]
    example = f"The call had {len(problems)} samples; the first:\n{_show(problems[0], completions[0])}"
    try:
        values = _within(timeout_s, lambda: function(prompts=prompts, completions=texts, **columns))
    except (Exception, SystemExit) as error:
        hint = ""
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            hint = f"\nIt gets prompts, completions and the columns {', '.join(names)}: let it end in **columns."
        raise RewardError(f"reward {name!r} failed with {_describe(error)}{hint}\n{example}") from error
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"reward {name!r} gave {type(values).__name__} {values!r:.80}, not a list with one number per completion\n{example}"
        )
    if len(values) != len(completions):
        raise RewardError(f"reward {name!r} gave {len(values)} numbers for {len(completions)} completions\n{example}")
    numbers = [_number(name, value, problem, completion) for value, problem, completion in zip(values, problems, completions, strict=True)]
    num_nan = sum(value is not None and math.isnan(value) for value in numbers)
    if num_nan:
        warnings.warn(f"reward {name!r} gave NaN for {num_nan} of {len(numbers)} completions; counted as None", stacklevel=3)
    return [None if value is None or math.isnan(value) else value for value in numbers]


def _within(timeout_s: float | None, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises; `TimeoutError` after `timeout_s` seconds, for which it runs in a thread that nobody waits for."""
    if timeout_s is None:
        return call()
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="reward", daemon=True).start()
    try:
        return outcome.result(timeout_s)
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no answer within {timeout_s:g} s (task.reward_timeout_s)") from None


def _number(name: str, value: Any, problem: Problem, completion: str) -> float | None:
    if value is None:
        return None
    # numpy scalars and one-element tensors know `item`; a bool is a number here: True is 1.0.
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, Real) or math.isinf(plain):
        raise RewardError(f"reward {name!r} gave {plain!r:.80}, not a finite number or None\n{_show(problem, completion)}")
    return float(plain)


def _describe(error: BaseException) -> str:
    """The error and where it was raised, in one line."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" ({place.tb_frame.f_code.co_filename}, line {place.tb_lineno})" if place is not None else ""
    return f"{type(error).__name__}: {error}{where}"


def _show(problem: Problem, completion: str) -> str:
    return f"  prompt:     {repr(problem.prompt)[:_SHOWN_CHARACTERS]}\n  completion: {repr(completion)[:_SHOWN_CHARACTERS]}"


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


@cache
def _another_main_thread() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


def _math_verify_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise MissingPackageError("math-verify", "the reward 'math_verify'", "train") from None
    return parse, verify
