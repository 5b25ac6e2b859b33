"""A discrete-event simulation: processes use shared resources or sleep, and time jumps from one completion to the next.

A process is a generator. It yields `Use(resource, amount)`, `Sleep(seconds)`, or a list of processes that it waits for.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator
from dataclasses import dataclass
from itertools import count


class Shared:
    """What several jobs use at once and in equal parts: cores, a network interface."""

    def __init__(self, capacity: float, each: float = math.inf, crowd: float = 1.0) -> None:
        """`capacity` units a second for all jobs, at most `each` for one; times `crowd` where more than one is at work."""
        self._capacity, self._each, self._crowd = capacity, each, crowd
        # Jobs progress at one rate, so that a job ends when each job has been served its amount more than when it came.
        self._served, self._last = 0.0, 0.0
        self._jobs: list[tuple[float, int, _Task]] = []

    def _rate(self) -> float:
        return min(self._each, self._capacity / len(self._jobs)) * (self._crowd if len(self._jobs) > 1 else 1.0)

    def _advance(self, now: float) -> None:
        if self._jobs:
            self._served += (now - self._last) * self._rate()
        self._last = now

    def add(self, now: float, amount: float, order: int, task: _Task) -> None:
        """A job that begins now."""
        self._advance(now)
        heapq.heappush(self._jobs, (self._served + amount, order, task))

    def next_end(self) -> float:
        """When the first of its jobs ends, if none comes in between."""
        return self._last + max(0.0, self._jobs[0][0] - self._served) / self._rate() if self._jobs else math.inf

    def pop(self, now: float) -> _Task:
        """End that job."""
        self._advance(now)
        return heapq.heappop(self._jobs)[2]


@dataclass(frozen=True, slots=True)
class Use:
    """So many units of a resource: core seconds, bytes."""

    resource: Shared
    amount: float


@dataclass(frozen=True, slots=True)
class Sleep:
    """Seconds on something that nobody else uses."""

    seconds: float


Process = Generator["Use | Sleep | list[Process]", None, None]


class _Task:
    """A process that was begun, and who waits for it."""

    __slots__ = ("num_awaited", "parent", "process")

    def __init__(self, process: Process, parent: _Task | None) -> None:
        self.process, self.parent, self.num_awaited = process, parent, 0


class Simulation:
    """Runs a process and all that it waits for; `now` is the time in it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._asleep: list[tuple[float, int, _Task]] = []
        self._resources: dict[int, Shared] = {}

    def run(self, process: Process) -> float:
        """Until `process` has ended; returns when."""
        self._go_on(_Task(process, None))
        while True:
            resource = min(self._resources.values(), key=Shared.next_end, default=None)
            end = math.inf if resource is None else resource.next_end()
            wake = self._asleep[0][0] if self._asleep else math.inf
            if min(end, wake) == math.inf:
                return self.now
            self.now = min(end, wake)
            if wake <= end:
                self._go_on(heapq.heappop(self._asleep)[2])
            else:
                assert resource is not None
                self._go_on(resource.pop(self.now))

    def _go_on(self, first: _Task) -> None:
        """Run a task to its next wait, and so every task that it begins or that waited for its end."""
        ready = [first]
        while ready:
            task = ready.pop()
            try:
                wanted = next(task.process)
            except StopIteration:
                if task.parent is not None:
                    task.parent.num_awaited -= 1
                    if not task.parent.num_awaited:
                        ready.append(task.parent)
                continue
            if isinstance(wanted, list):
                task.num_awaited = len(wanted)
                ready += [_Task(process, task) for process in reversed(wanted)] or [task]
            elif isinstance(wanted, Sleep):
                heapq.heappush(self._asleep, (self.now + wanted.seconds, next(self._order), task))
            else:
                self._resources[id(wanted.resource)] = wanted.resource
                wanted.resource.add(self.now, wanted.amount, next(self._order), task)
