"""Many engines as one: who answers what, and what becomes of those that fail. Engines here answer at once, with who they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from deploy_targets.engines.pool import Place, PoolEngine, PoolRules
from deploy_targets.errors import EngineError, UsageError
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile

PROMPTS = [(1, index) for index in range(12) for _ in range(2)]
SAMPLING = Sampling(4, seed=3)


@dataclass
class Box:
    """A place whose engines fail on request; `calls` counts what it answered."""

    name: str
    fail: Callable[[str], None] = lambda call: None
    calls: list[str] = field(default_factory=list)
    closed: int = 0
    started: int = 0
    wrong_version: int = 0
    lost: int = 0

    def open(self, folder: Path, weight_version: int) -> BoxEngine:
        self.fail("start")
        self.started += 1
        return BoxEngine(self, weight_version)


class BoxEngine:
    """What it samples follows from seed and prompt alone, as with every engine."""

    def __init__(self, box: Box, weight_version: int) -> None:
        self._box, self.weight_version = box, weight_version

    def _called(self, call: str) -> None:
        self._box.fail(call)
        self._box.calls.append(call)

    def update(self, weights: WeightFile) -> int:
        self._called("update")
        self.weight_version = weights.weight_version
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        self._called("generate")
        drawn = np.random.default_rng(sampling.seed).integers(0, 99, (len(prompts), sampling.max_tokens)).astype(np.int32)
        logps, version = np.zeros(sampling.max_tokens, np.float32), self.weight_version + self._box.wrong_version
        found = [Generation(tuple(p), row, logps, version, 1.0, "length") for p, row in zip(prompts, drawn, strict=True)]
        return found[self._box.lost :]

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        self._called("score")
        return [TokenScores(np.float32([s.tokens[-1]]), np.int32([0]), self.weight_version, temperature) for s in sequences]

    def close(self) -> None:
        self._box.closed += 1


@pytest.fixture
def boxes() -> list[Box]:
    return [Box(name) for name in "abc"]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def pool(boxes: list[Box], said: list[str], request: pytest.FixtureRequest) -> Iterator[PoolEngine]:
    """Parametrized by its rules."""
    rules = getattr(request, "param", PoolRules(restart_after_s=0.0))
    pool = PoolEngine([Place(box.name, box.open) for box in boxes], Path(), 0, rules=rules, say=said.append)
    yield pool
    pool.close()
    assert all(box.closed == box.started for box in boxes), "every engine that was started is closed"


def dying(*calls: str, times: int = 1000) -> Callable[[str], None]:
    """Raise in the first so many of these calls."""
    left = [times]

    def fail(call: str) -> None:
        if call in calls and left[0] > 0:
            left[0] -= 1
            raise EngineError(f"died in {call}")

    return fail


def tokens_of(generations: Sequence[Generation]) -> list[list[int]]:
    return [generation.tokens.tolist() for generation in generations]


def test_answers_come_in_order_and_groups_stay_together(pool: PoolEngine, boxes: list[Box]) -> None:
    generations = pool.generate(PROMPTS, SAMPLING)
    assert [generation.prompt for generation in generations] == PROMPTS
    assert sum(len(box.calls) for box in boxes) == 12, "four requests for each engine, of one prompt's two responses at least"
    sequences = [TokenSequence((1, 2, index), 2) for index in range(30)]
    assert [score.logps[0] for score in pool.score(sequences)] == list(range(30))
    assert pool.generate([], SAMPLING) == []


def test_the_same_call_draws_the_same_whoever_answers(pool: PoolEngine, boxes: list[Box]) -> None:
    whole = tokens_of(pool.generate(PROMPTS, SAMPLING))
    boxes[0].fail = dying("generate")
    boxes[1].fail = dying("generate", times=1)
    assert tokens_of(pool.generate(PROMPTS, SAMPLING)) == whole
    assert len({tuple(row) for row in whole}) == len(whole), "requests draw from seeds of their own"


def test_the_faster_engine_answers_more(pool: PoolEngine, boxes: list[Box]) -> None:
    boxes[0].fail = lambda call: time.sleep(0.2)
    pool.generate(PROMPTS, SAMPLING)
    assert len(boxes[0].calls) <= 2 < len(boxes[1].calls)


@pytest.mark.parametrize("fault", [{"fail": dying("generate")}, {"wrong_version": 1}, {"lost": 1}], ids=["dies", "version", "too_few"])
def test_what_a_failed_engine_had_is_asked_of_another(
    pool: PoolEngine, boxes: list[Box], said: list[str], fault: dict[str, object]
) -> None:
    whole = tokens_of(pool.generate(PROMPTS, SAMPLING))
    for name, value in fault.items():
        setattr(boxes[1], name, value)
    # The others wait, so that the failing one is asked at all.
    for box in (boxes[0], boxes[2]):
        box.fail = lambda call: time.sleep(0.02)
    assert tokens_of(pool.generate(PROMPTS, SAMPLING)) == whole
    assert (pool.num_serving, pool.num_resent) == (2, 1)
    assert said[0].startswith("engine b is out: ")
    assert boxes[1].closed == 1


def test_an_engine_comes_back_with_the_next_update(pool: PoolEngine, boxes: list[Box], said: list[str]) -> None:
    boxes[2].fail = dying("update", times=1)
    assert pool.update(WeightFile(Path("w"), 1)) == 1
    assert pool.num_serving == 2
    until(lambda: boxes[2].started == 2)
    until(lambda: pool._members[2].coming.done())
    pool.generate(PROMPTS, SAMPLING)
    assert "generate" not in boxes[2].calls, "it has not got the weights of now"
    assert pool.update(WeightFile(Path("w"), 2)) == 2
    assert (pool.num_serving, pool.num_restarts) == (3, 1)
    assert said[-1] == "engine c is back"
    assert {generation.weight_version for generation in pool.generate(PROMPTS, SAMPLING)} == {2}


def test_one_that_does_not_start_again_is_tried_again_later(pool: PoolEngine, boxes: list[Box], said: list[str]) -> None:
    boxes[0].fail = dying("update", "start", times=2)
    pool.update(WeightFile(Path("w"), 1))
    until(lambda: pool._members[0].coming.done())
    pool.update(WeightFile(Path("w"), 2))
    assert "it could not be started anew: died in start" in said[-1]
    until(lambda: pool._members[0].coming.done())
    pool.update(WeightFile(Path("w"), 3))
    assert pool.num_serving == 3


def test_each_engine_is_proven(pool: PoolEngine, said: list[str]) -> None:
    asked: list[object] = []

    def first_fails(engine: object) -> str | None:
        asked.append(engine)
        return "gap 0.3" if engine is pool._members[0].engine else None

    assert pool.prove(first_fails) is None
    assert len(asked) == 3
    assert "engine a is out: its proof failed: gap 0.3" in said[0]
    reasons = pool.prove(lambda engine: "gap 0.4")
    assert reasons is not None
    assert sorted(reasons.split("; ")) == ["b: gap 0.4", "c: gap 0.4"]


@pytest.mark.parametrize("pool", [PoolRules(min_engines=2, restart_after_s=60)], indirect=True)
def test_too_few_engines_end_the_call(pool: PoolEngine, boxes: list[Box]) -> None:
    for box in boxes[:2]:
        box.fail = dying("generate")

    def until_refused() -> None:
        while True:
            pool.generate(PROMPTS, SAMPLING)

    with pytest.raises(EngineError, match=r"1 of 3 engines are left to answer, fewer than pool\.min_engines = 2"):
        until_refused()


def test_whoever_cannot_be_told_of_a_failure_keeps_nobody_waiting(boxes: list[Box]) -> None:
    """A terminal that is gone, a full disk behind stdout."""

    def say(sentence: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    pool = PoolEngine([Place(box.name, box.open) for box in boxes], Path("unused"), 0, rules=PoolRules(), say=say)
    for box in boxes:
        box.fail = dying("generate")
    with pytest.raises(BrokenPipeError):
        pool.generate(PROMPTS, SAMPLING)
    pool.close()


def test_all_dead_is_an_error_and_no_wait(pool: PoolEngine, boxes: list[Box]) -> None:
    for box in boxes:
        box.fail = dying("generate", "update", "start")
    with pytest.raises(EngineError, match="0 of 3 engines are left"):
        pool.generate(PROMPTS, SAMPLING)
    with pytest.raises(EngineError, match="no engine of 3 took version 1"):
        pool.update(WeightFile(Path("w"), 1))


def test_a_mistake_of_the_caller_is_no_fault_of_an_engine(pool: PoolEngine, boxes: list[Box]) -> None:
    def refuse(call: str) -> None:
        raise UsageError("the prompt is too long")

    for box in boxes:
        box.fail = refuse
    with pytest.raises(UsageError, match="too long"):
        pool.generate(PROMPTS, SAMPLING)
    assert pool.num_serving == 3


def test_a_start_without_one_of_them_goes_on_and_says_so(boxes: list[Box], said: list[str]) -> None:
    boxes[1].fail = dying("start")
    places = [Place(box.name, box.open) for box in boxes]
    pool = PoolEngine(places, Path(), 0, rules=PoolRules(restart_after_s=60), say=said.append)
    assert pool.num_serving == 2
    assert "engine b is out: it could not be started: died in start. It is started anew in 60 s" in said[0]
    pool.close()
    with pytest.raises(EngineError, match="2 of 3 engines could be started"):
        PoolEngine(places, Path(), 0, rules=PoolRules(3, restart_after_s=60), say=said.append)
    assert all(box.closed == box.started for box in boxes)


def test_one_that_is_being_started_when_the_pool_closes_is_closed(boxes: list[Box]) -> None:
    pool = PoolEngine([Place(box.name, box.open) for box in boxes], Path(), 0, rules=PoolRules(restart_after_s=0), say=lambda text: None)
    go_on = threading.Event()
    boxes[0].fail = lambda call: go_on.wait() and None if call == "start" else dying("update")(call)
    pool.update(WeightFile(Path("w"), 1))
    pool.close()
    go_on.set()
    until(lambda: all(box.closed == box.started for box in boxes))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
