"""The tasks of the evidence: problems with written-out solutions, as JSONL files, and what counts as right.

`addition` is the demo's task. `expression` adds and subtracts one-digit numbers from left to right, a step at a time: an error anywhere
spoils the answer. `sorting` puts two-digit numbers in order: the longest answers, each token of which has to be right.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_TRAIN, NUM_HELDOUT = 40_000, 1_000


@dataclass(frozen=True, slots=True)
class Sample:
    """A problem: `solution` is what the warm start learns to write, `answer` what the reward looks for."""

    prompt: str
    solution: str
    answer: str


def expression(rng: random.Random) -> Sample:
    """`7+8-3+9=` is solved by `15-3+9;12+9;21`."""
    rest = [f"{rng.choice('+-')}{rng.randrange(10)}" for _ in range(4)]
    value = rng.randrange(10)
    prompt = f"{value}{''.join(rest)}="
    steps = []
    for done, term in enumerate(rest, 1):
        value += int(term)
        steps.append(f"{value}{''.join(rest[done:])}")
    return Sample(prompt, ";".join(steps), str(value))


def sorting(rng: random.Random) -> Sample:
    """`83 17 52 10:` is solved by `10 17 52 83`, with eight numbers."""
    numbers = [str(rng.randrange(10, 100)) for _ in range(8)]
    answer = " ".join(sorted(numbers))
    return Sample(f"{' '.join(numbers)}:", answer, answer)


SAMPLERS: dict[str, Callable[[random.Random], Sample]] = {"expression": expression, "sorting": sorting}


def samples(task: str, seed: int = 0) -> Iterator[Sample]:
    """Different problems without end; those of `expression_10M` are those of `expression`."""
    problems = task.partition("_")[0]
    rng, seen = random.Random(f"{problems}/{seed}"), set()
    while True:
        sample = SAMPLERS[problems](rng)
        if sample.prompt not in seen:
            seen.add(sample.prompt)
            yield sample


def write_files(task: str, folder: Path) -> tuple[Path, Path]:
    """The problems to train on and those held out: different ones, the same in every call. Returns their paths."""
    drawn = samples(task)
    paths = folder / f"{task}-heldout.jsonl", folder / f"{task}-train.jsonl"
    for path, count in zip(paths, (NUM_HELDOUT, NUM_TRAIN), strict=True):
        lines = (next(drawn) for _ in range(count))
        path.write_text(
            "".join(json.dumps({"prompt": s.prompt, "answer": s.answer, "solution": s.solution}) + "\n" for s in lines), "utf-8"
        )
    return paths[1], paths[0]


def last_step(prompts: list[str], completions: list[str], answer: list[Any], **columns: Any) -> list[float]:
    """1 for a response whose last step is the answer, else 0."""
    return [float(completion.rpartition(";")[2].strip() == str(right)) for completion, right in zip(completions, answer, strict=True)]
