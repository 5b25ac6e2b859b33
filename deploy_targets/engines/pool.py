"""Many engines of one target behind the protocol of one: work goes where there is room, and what fails is taken out and started anew.

    members ── each its own process or its own machine
       ▲
    generate, score:  one queue of requests, each taken by whichever engine is free; what a failed one had is asked of another
    update:           all of them, at once; those that came back are brought along
    prove:            each of them; who fails is out

There is one weight_version: an engine that does not serve it does not serve.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from deploy_targets.errors import EngineError
from deploy_targets.protocols import Engine
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile

Request = TypeVar("Request")
Answer = TypeVar("Answer")
MAX_PAUSE_S = 300.0
"""Longest wait between two attempts to start an engine anew."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine of the pool runs: `open` starts it on (folder in its native format, weight_version)."""

    name: str
    open: Callable[[Path, int], Engine]


@dataclass(frozen=True, slots=True)
class PoolRules:
    """How a pool works. `min_engines`: it fails with fewer. `requests_per_engine`: into how many of them a call is cut for each place.

    `restart_after_s`: pause before a failed engine is started anew, doubled with each failure in a row.
    """

    min_engines: int = 1
    requests_per_engine: int = 4
    restart_after_s: float = 5.0


@dataclass(slots=True)
class _Member:
    place: Place
    engine: Engine | None = None
    """None while it is out."""
    coming: Future[Engine] | None = None
    """The engine that is being started in its place."""
    failures: int = 0
    """In a row; forgotten once it has answered."""


@dataclass(slots=True)
class _Work:
    """Requests that wait, and the answers there are; guarded by `changed`."""

    waiting: deque[int]
    num_asked: int = 0
    """Requests that an engine has, and may yet fail to answer."""
    error: Exception | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)


class PoolEngine:
    """The engine protocol over several engines of one target."""

    def __init__(
        self, places: Sequence[Place], artifact_dir: Path, weight_version: int, *, rules: PoolRules, say: Callable[[str], None]
    ) -> None:
        """Start an engine at every place; `say` is told, in a sentence, who is out, why, and who is back.

        Raises `EngineError` where fewer than `rules.min_engines` start, and the mistakes of the user (a wrong token) as they are.
        """
        self.weight_version, self._artifact_dir, self._rules, self._say = weight_version, artifact_dir, rules, say
        self._members = [_Member(place) for place in places]
        self._lock = threading.Lock()
        self._closing = False
        self.num_resent = self.num_restarts = 0
        try:
            self._each(self._members, self._start)
            self._require_enough("could be started")
        except BaseException:
            self.close()
            raise

    @property
    def num_serving(self) -> int:
        """Engines that serve the weight_version of now."""
        return len(self._serving())

    def update(self, weights: WeightFile) -> int:
        """Bring the weights to all engines at once, and with them those that were started anew. Raises `EngineError` where none follows."""
        for member in self._members:
            self._welcome(member)
        self.weight_version = weights.weight_version
        self._each(self._serving(), lambda member: self._update_one(member, weights))
        if not self.num_serving:
            raise EngineError(f"no engine of {len(self._members)} took version {weights.weight_version} of the weights")
        return self.weight_version

    def prove(self, check: Callable[[Engine], str | None]) -> str | None:
        """Have each engine checked; those of which `check` gives a reason are taken out. Returns all reasons where none is left."""
        reasons: list[str] = []

        def prove_one(member: _Member) -> None:
            assert member.engine is not None
            reason = check(member.engine)
            if reason is not None:
                reasons.append(f"{member.place.name}: {reason}")
                self._take_out(member, f"its proof failed: {reason}")

        self._each(self._serving(), prove_one)
        return None if self.num_serving else "; ".join(reasons)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """See `Engine.generate`. What is drawn follows from the call and the number of places, not from who answers what."""
        parts = self._parts([len(prompt) + sampling.max_tokens for prompt in prompts], [tuple(prompt) for prompt in prompts])
        seeds = np.random.SeedSequence(sampling.seed).generate_state(max(1, len(parts)))
        requests = [(prompts[part.start : part.stop], replace(sampling, seed=int(seed))) for part, seed in zip(parts, seeds, strict=False)]
        return self._spread(requests, lambda engine, request: engine.generate(*request), lambda request: len(request[0]))

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """See `Engine.score`."""
        parts = self._parts([len(sequence.tokens) for sequence in sequences], range(len(sequences)))
        requests = [sequences[part.start : part.stop] for part in parts]
        return self._spread(requests, lambda engine, request: engine.score(request, temperature), len)

    def close(self) -> None:
        """Close every engine, and those that are being started."""
        with self._lock:
            self._closing = True
        for member in self._members:
            engine, member.engine = member.engine, None
            if engine is not None:
                engine.close()
            coming, member.coming = member.coming, None
            # One that is still being started is closed by the thread that starts it.
            if coming is not None and coming.done() and coming.exception() is None:
                coming.result().close()

    def _serving(self) -> list[_Member]:
        return [member for member in self._members if member.engine is not None]

    def _parts(self, costs: Sequence[int], keys: Iterable[object]) -> list[range]:
        """Cut a call into parts of about equal cost, tokens at most; items of equal neighbouring `keys` stay together."""
        budget = sum(costs) / (self._rules.requests_per_engine * len(self._members))
        parts: list[range] = []
        start, spent, last = 0, 0, None
        for index, (cost, key) in enumerate(zip(costs, keys, strict=True)):
            if spent >= budget and key != last:
                parts.append(range(start, index))
                start, spent = index, 0
            spent, last = spent + cost, key
        return [*parts, range(start, len(costs))] if len(costs) else []

    def _spread(
        self, requests: Sequence[Request], ask: Callable[[Engine, Request], list[Answer]], size: Callable[[Request], int]
    ) -> list[Answer]:
        """Have the requests answered by whoever is free. Raises `EngineError` when too few engines are left to go on."""
        answers: dict[int, list[Answer]] = {}
        work = _Work(deque(range(len(requests))))

        def serve(member: _Member) -> None:
            while (index := _next(work)) is not None:
                request, answer, error = requests[index], None, None
                try:
                    answer = self._answer(member, request, ask, size(request))
                except Exception as raised:
                    error = raised
                with work.changed:
                    # Whatever happened, the others must not wait for this one.
                    work.num_asked -= 1
                    if error is not None:
                        work.error = error
                    elif answer is not None:
                        answers[index] = answer
                    else:
                        work.waiting.appendleft(index)
                        self.num_resent += 1
                    work.changed.notify_all()
                if answer is None:
                    return

        while len(answers) < len(requests) and work.error is None:
            self._require_enough("are left to answer")
            self._each(self._serving(), serve)
        if work.error is not None:
            raise work.error
        return [item for index in range(len(requests)) for item in answers[index]]

    def _answer(self, member: _Member, request: Request, ask: Callable[[Engine, Request], list[Answer]], size: int) -> list[Answer] | None:
        """What `member` answers; None where it fails and is taken out. Raises what is not its fault."""
        assert member.engine is not None
        try:
            answer = ask(member.engine, request)
            self._check(answer, size)
        except EngineError as error:
            self._take_out(member, str(error))
            return None
        member.failures = 0
        return answer

    def _check(self, answer: Sequence[object], count: int) -> None:
        """Raises `EngineError` for an answer that is none to the question, or of another version of the weights."""
        if len(answer) != count:
            raise EngineError(f"it gave {len(answer)} answers to {count} requests")
        versions = {item.weight_version for item in answer if isinstance(item, Generation | TokenScores)}
        if versions - {self.weight_version}:
            raise EngineError(f"it answered with version {sorted(versions)} of the weights in place of {self.weight_version}")

    def _update_one(self, member: _Member, weights: WeightFile) -> None:
        assert member.engine is not None
        try:
            served = member.engine.update(weights)
            if served != weights.weight_version:
                raise EngineError(f"it serves version {served} after an update to {weights.weight_version}")
        except EngineError as error:
            self._take_out(member, str(error))

    def _start(self, member: _Member) -> None:
        try:
            member.engine = member.place.open(self._artifact_dir, self.weight_version)
        except EngineError as error:
            self._take_out(member, f"it could not be started: {error}")

    def _take_out(self, member: _Member, why: str) -> None:
        """No work for this one until the next update, by when another may stand in its place."""
        with self._lock:
            engine, member.engine = member.engine, None
            pause = min(MAX_PAUSE_S, self._rules.restart_after_s * 2**member.failures)
            member.failures += 1
            member.coming = Future()
        starter = threading.Timer(pause, self._restart, [member.place, member.coming])
        starter.daemon = True
        starter.start()
        try:
            self._say(f"engine {member.place.name} is out: {why}. It is started anew in {pause:g} s; {self.num_serving} go on")
        finally:
            if engine is not None:
                engine.close()

    def _restart(self, place: Place, coming: Future[Engine]) -> None:
        if self._closing:
            return
        try:
            # The version matters little: no engine serves before it was given those of the next update.
            engine = place.open(self._artifact_dir, self.weight_version)
        except Exception as error:
            coming.set_exception(error)
            return
        with self._lock:
            if not self._closing:
                coming.set_result(engine)
                return
        engine.close()

    def _welcome(self, member: _Member) -> None:
        """Let an engine that was started anew take part, if it is ready."""
        if member.coming is None or not member.coming.done():
            return
        coming, member.coming = member.coming, None
        error = coming.exception()
        if error is not None:
            self._take_out(member, f"it could not be started anew: {error}")
            return
        member.engine = coming.result()
        self.num_restarts += 1
        self._say(f"engine {member.place.name} is back")

    def _require_enough(self, what: str) -> None:
        if self.num_serving < self._rules.min_engines:
            raise EngineError(
                f"{self.num_serving} of {len(self._members)} engines {what}, fewer than pool.min_engines = {self._rules.min_engines}. "
                "The warnings above say why each is out"
            )

    @staticmethod
    def _each(members: Sequence[_Member], act: Callable[[_Member], None]) -> None:
        """Act on all members at once. Raises what the first of them raised, once all are done."""
        with ThreadPoolExecutor(max(1, len(members)), thread_name_prefix="pool") as threads:
            for done in [threads.submit(act, member) for member in members]:
                done.result()


def _next(work: _Work) -> int | None:
    """A request to answer; waits while one that another engine has may yet come back. None: there will be none."""
    with work.changed:
        while not work.waiting and work.num_asked and work.error is None:
            work.changed.wait()
        if not work.waiting or work.error is not None:
            return None
        work.num_asked += 1
        return work.waiting.popleft()
