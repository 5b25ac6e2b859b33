"""A training step in the simulation: what each phase costs, where it runs, and how the phases follow each other (hetero_rl/loop.py).

sync            rollouts ──▶ learn ──▶ quantize ──▶ make the difference ──▶ every engine: send, load ──▶ proof
one_step_off    rollouts │ learn ──▶ quantize ──▶ ...
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.scaling.events import Process, Shared, Simulation, Sleep, Use

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Decode:
    """What an engine needs. `step_s[i]`: seconds in which `batch_sizes[i]` responses grow by a token; lines in between."""

    batch_sizes: tuple[float, ...]
    step_s: tuple[float, ...]
    request_s: float
    """Of a call of the engine, whatever is asked."""
    response_s: float
    """Of a response whatever its length: reading the prompt, making room."""
    max_batch: int
    """Responses that grow at once; the next one begins where one has ended."""

    def seconds(self, lengths: Lengths) -> float:
        """A request for responses of these lengths, by itself."""
        starts, ends = slots(lengths, self.max_batch)
        # How many grow changes where one begins or ends.
        times = np.unique(np.concatenate([starts, ends]))
        live = np.searchsorted(np.sort(starts), times[:-1], "right") - np.searchsorted(np.sort(ends), times[:-1], "right")
        step = np.interp(live, self.batch_sizes, self.step_s)
        beyond = live > self.batch_sizes[-1]
        if beyond.any():
            slope = (self.step_s[-1] - self.step_s[-2]) / (self.batch_sizes[-1] - self.batch_sizes[-2])
            step = np.where(beyond, self.step_s[-1] + slope * (live - self.batch_sizes[-1]), step)
        return self.request_s + self.response_s * len(lengths) + float((np.diff(times) * step).sum())


def slots(lengths: Lengths, max_batch: int) -> tuple[Lengths, Lengths]:
    """Steps at which each response begins and ends, `max_batch` at a time, the next where one has ended."""
    if len(lengths) <= max_batch:
        return np.zeros_like(lengths), lengths
    free = [0] * max_batch
    starts = np.zeros_like(lengths)
    for i, length in enumerate(lengths):
        starts[i] = heapq.heappop(free)
        heapq.heappush(free, int(starts[i] + length))
    return starts, starts + lengths


@dataclass(frozen=True)
class Costs:
    """Seconds of one machine at work alone, and bytes. What is done by each engine is given for one of them."""

    decode: Decode
    reward_s: float
    """Per response, by rank 0: the reward, and reading the answer."""
    learner_fixed_s: float
    """Of an update on every rank, however many share it: the optimizer's step."""
    forward_s: float
    """Per token without a gradient, on one rank."""
    train_s: float
    """Per token with one, forward and backward, on one rank."""
    old_logp_s: float
    """Per token: the log-probs by the weights of before, which `one_step_off` needs."""
    reduce_s: float
    """Sums of the gradients over ranks, where there are several."""
    quantize_s: float
    pack_s: float
    """The difference to the last version, made once, by one core of the learner's machine."""
    update_bytes: float
    """That an engine is sent."""
    load_s: float
    """Unpack and load it, by the engine's machine."""
    twin_s: float
    """The proof by the learner, once."""
    score_s: float
    """The proof by an engine."""


@dataclass(frozen=True)
class Workload:
    """What a step samples. `lengths`: of responses, from which each step draws."""

    num_prompts: int
    group_size: int
    prompt_tokens: float
    lengths: tuple[int, ...]
    taught_share: float
    """Responses with a gradient: groups of equal rewards have none."""

    def draw(self, rng: np.random.Generator) -> Lengths:
        """Lengths of the responses of one step, neighbours sharing a prompt."""
        return rng.choice(np.array(self.lengths, np.int64), self.num_prompts * self.group_size)


@dataclass(frozen=True)
class Cluster:
    """Where it runs. `local_cores`: everything shares so many cores, of `crowd` times the speed where more than one computes.

    Unset, each engine and each rank computes on its own, and the learner's machine has `host_cores` and a network
    interface of `nic` bytes/s, of which an engine takes at most `link`; every message takes `latency_s` there and back.
    """

    num_engines: int
    num_ranks: int = 1
    schedule: str = "sync"
    requests_per_engine: int = 4
    local_cores: int | None = None
    crowd: float = 1.0
    host_cores: float = 1.0
    nic: float = math.inf
    link: float = math.inf
    latency_s: float = 0.0


@dataclass(frozen=True)
class Step:
    """Seconds. `decode`: the mean engine's work; `stragglers`: what the last one takes longer than that, idle engines included."""

    step: float
    rollout: float
    decode: float
    reward: float
    learn: float
    quantize: float
    update: float
    proof: float
    num_tokens: float

    @property
    def stragglers(self) -> float:
        """What the last engine takes longer than the mean one."""
        return self.rollout - self.decode

    @property
    def publish(self) -> float:
        """From the learner's step to the proof."""
        return self.quantize + self.update + self.proof


def requests_of(num_prompts: int, group_size: int, num_parts: int) -> list[range]:
    """How a pool cuts the responses of a step into requests: `PoolEngine._parts` for prompts of equal length."""
    budget = num_prompts * group_size / num_parts
    parts, start = [], 0
    for prompt in range(1, num_prompts):
        if prompt * group_size - start >= budget:
            parts.append(range(start, prompt * group_size))
            start = prompt * group_size
    return [*parts, range(start, num_prompts * group_size)]


class _Run:
    """One step of one cluster."""

    def __init__(self, costs: Costs, cluster: Cluster, workload: Workload, lengths: Lengths) -> None:
        self.costs, self.cluster, self.workload, self.lengths = costs, cluster, workload, lengths
        self.simulation = Simulation()
        self.cores = None if cluster.local_cores is None else Shared(cluster.local_cores, 1.0, cluster.crowd)
        self.host = self.cores or Shared(cluster.host_cores, 1.0)
        self.network = Shared(cluster.nic, cluster.link)
        self.spent: dict[str, float] = {}
        self.decode_s = 0.0

    def compute(self, seconds: float) -> Use | Sleep:
        return Sleep(seconds) if self.cores is None else Use(self.cores, seconds)

    def timed(self, name: str, process: Process) -> Process:
        start = self.simulation.now
        yield from process
        self.spent[name] = self.simulation.now - start

    def rollouts(self) -> Process:
        cluster, workload = self.cluster, self.workload
        parts = requests_of(workload.num_prompts, workload.group_size, cluster.requests_per_engine * cluster.num_engines)
        waiting = deque(parts)

        def engine() -> Process:
            while waiting:
                part = waiting.popleft()
                seconds = self.costs.decode.seconds(self.lengths[part.start : part.stop])
                self.decode_s += seconds
                yield Sleep(cluster.latency_s)
                yield self.compute(seconds)

        yield [engine() for _ in range(cluster.num_engines)]

    def rewards(self) -> Process:
        yield Use(self.host, self.costs.reward_s * len(self.lengths))

    def learn(self) -> Process:
        costs, ranks = self.costs, self.cluster.num_ranks
        workload, num_responses = self.workload, len(self.lengths)
        num_tokens = workload.prompt_tokens * workload.num_prompts + float(self.lengths.sum()) - num_responses
        work = num_tokens * (workload.taught_share * costs.train_s + (1 - workload.taught_share) * costs.forward_s)
        if self.cluster.schedule == "one_step_off":
            work += num_tokens * costs.old_logp_s

        def rank() -> Process:
            yield self.compute(work / ranks + costs.learner_fixed_s)

        yield [rank() for _ in range(ranks)]
        if ranks > 1:
            yield Sleep(costs.reduce_s)

    def quantize(self) -> Process:
        yield self.compute(self.costs.quantize_s)

    def update(self) -> Process:
        costs = self.costs

        def engine() -> Process:
            if costs.update_bytes:
                yield Use(self.network, costs.update_bytes)
            yield Sleep(self.cluster.latency_s)
            yield self.compute(costs.load_s)

        if costs.pack_s:
            yield Use(self.host, costs.pack_s)
        yield [engine() for _ in range(self.cluster.num_engines)]

    def proof(self) -> Process:
        yield self.compute(self.costs.twin_s)

        def engine() -> Process:
            yield Sleep(self.cluster.latency_s)
            yield self.compute(self.costs.score_s)

        yield [engine() for _ in range(self.cluster.num_engines)]

    def step(self) -> Process:
        def make() -> Process:
            yield from self.timed("rollout", self.rollouts())
            yield from self.timed("reward", self.rewards())

        learn = self.timed("learn", self.learn())
        if self.cluster.schedule == "one_step_off":
            yield [make(), learn]
        else:
            yield from make()
            yield from learn
        for name, process in (("quantize", self.quantize()), ("update", self.update()), ("proof", self.proof())):
            yield from self.timed(name, process)

    def result(self) -> Step:
        step = self.simulation.run(self.step())
        # An engine that shares its cores waits as well: what it would take by itself is not what it spent.
        decode = self.decode_s / self.cluster.num_engines
        return Step(step, decode=min(decode, self.spent["rollout"]), num_tokens=float(self.lengths.sum()), **self.spent)


def simulate(costs: Costs, cluster: Cluster, workload: Workload, *, num_steps: int = 4, seed: int = 0) -> Step:
    """The mean over `num_steps` steps, each with lengths of its own."""
    rng = np.random.default_rng(seed)
    return mean([_Run(costs, cluster, workload, workload.draw(rng)).result() for _ in range(num_steps)])


def mean(steps: Sequence[Step]) -> Step:
    """Field by field."""
    return replace(steps[0], **{name: float(np.mean([getattr(step, name) for step in steps])) for name in Step.__dataclass_fields__})
