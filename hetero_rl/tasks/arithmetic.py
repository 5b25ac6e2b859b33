"""Generated arithmetic: `123+456=` is answered by `579`. Small enough to learn on a laptop, hard enough to show a gap."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from hetero_rl.tasks.base import Problem, Task, Tokenizer

if TYPE_CHECKING:
    from hetero_rl.tasks.rewards import Reward

HELDOUT_ONE_IN = 10
"""One pair of numbers in this many is held out."""


class ArithmeticTask(Task):
    """Problems `a?b=` with uniform a and b of exactly `digits` digits (0 to 9 for one digit)."""

    def __init__(self, tokenizer: Tokenizer, reward: Reward, *, digits: int, operations: Sequence[str], seed: int) -> None:
        """`operations` are drawn equally often; `seed` changes the training problems, never the held-out ones."""
        super().__init__(tokenizer, reward)
        self._digits = digits
        self._operations = tuple(operations)
        self._seed = seed

    def train_problems(self, step: int, num: int) -> list[Problem]:
        """`num` problems of the training side, drawn with replacement."""
        draws = self._draws(f"train/{self._seed}/{step}")
        problems: list[Problem] = []
        while len(problems) < num:
            operands = next(draws)
            if not is_heldout(*operands):
                problems.append(make_problem(*operands))
        return problems

    def heldout_problems(self, num: int) -> list[Problem]:
        """`num` different problems of the held-out side, or all of them when there are fewer."""
        draws = self._draws("heldout")
        found: dict[tuple[int, str, int], Problem] = {}
        # Twenty draws per existing problem leave out one in e^20, so that small ranges end too.
        for _ in range(20 * len(self._operations) * len(self._range()) ** 2):
            if len(found) == num:
                break
            operands = next(draws)
            if operands not in found and is_heldout(*operands):
                found[operands] = make_problem(*operands)
        return list(found.values())

    def longest_prompt(self) -> int:
        """Found on a thousand problems: all have the same number of digits."""
        return max(len(self.encode_prompt(problem)) for problem in self.heldout_problems(1000))

    def _range(self) -> range:
        return range(10 ** (self._digits - 1) if self._digits > 1 else 0, 10**self._digits)

    def _draws(self, name: str) -> Iterator[tuple[int, str, int]]:
        # Strings seed `random` through SHA-512: the same on every machine and Python.
        rng = random.Random(f"arithmetic/{name}")
        numbers = self._range()
        while True:
            yield rng.choice(numbers), rng.choice(self._operations), rng.choice(numbers)


def make_problem(a: int, operation: str, b: int) -> Problem:
    """The problem of two numbers, with `a`, `operation`, `b` and `answer` as columns."""
    answer = str({"+": a + b, "-": a - b, "*": a * b}[operation])
    return Problem(f"{a}{operation}{b}=", answer, {"a": a, "operation": operation, "b": b, "answer": answer})


def is_heldout(a: int, operation: str, b: int) -> bool:
    """The side of a pair, by a hash of the numbers: the same in every run, for both orders, and for every operation.

    Both orders share a side because 456+123 would give 123+456 away; `operation` is taken so that operands can be passed whole.
    """
    del operation
    digest = blake2b(f"{min(a, b)},{max(a, b)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0
