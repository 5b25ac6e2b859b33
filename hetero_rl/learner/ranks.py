"""Several ranks, one loop: rank 0 runs the loop and tells the others what it calls on its learner; they call the same on theirs.

    rank 0      loop.py ── learner.update(...) ─┬─ its share of the micro-batches ─┬─ gradients averaged ── step
    rank 1..    follow  ◀── ("update", ...)  ───┴─ its share ──────────────────────┘

Every rank is given all sequences, which are small, and takes its share of the forward passes; all take the same number of them, because
ZeRO-3 gathers weights in each. Without a launcher there is one rank, and nothing here costs anything.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch.distributed
import torch.distributed as dist

from hetero_rl.errors import RankError

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
LONGEST_SILENCE = datetime.timedelta(days=7)
"""How long the others wait for what rank 0 does next: rollouts, an evaluation, a person who looks at it in a debugger."""
END = "end"


def num_ranks() -> int:
    """Processes of this run, as a launcher (`torchrun`, `deepspeed`, launch.py) says it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def own_rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def join(backend: str) -> Ranks:
    """This process among those of the run, whom it meets if it has not yet. Every rank calls it as often as the others."""
    meet(backend)
    return Ranks()


def meet(backend: str, store: Any = None) -> None:
    """The process group of torch: that of the launcher, or one rank in this process without any port, as ports race.

    `store`: where the ranks of the launcher meet, if not where its environment says.
    """
    if dist.is_initialized():
        return
    if num_ranks() > 1 and store is not None:
        dist.init_process_group(backend, store=store, rank=own_rank(), world_size=num_ranks())
    elif num_ranks() > 1:
        dist.init_process_group(backend)
    else:
        # DeepSpeed asks the environment who it is, even where the process group is there.
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
        dist.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    # Its threads give tensors back to Python: one that does so while the interpreter ends takes the process down with SIGABRT.
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """This process among those of the run."""

    def __init__(self) -> None:
        """A group of its own for words, by gloo, which waits as long as it takes."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._words = dist.new_group(backend="gloo", timeout=LONGEST_SILENCE) if self.size > 1 else None
        self._depth = 0

    @property
    def leads(self) -> bool:
        """Whether this is the rank that runs the loop."""
        return self.rank == 0

    @property
    def are_together(self) -> bool:
        """Whether all are in the same call, so that what it calls need not be told."""
        return self._depth > 0

    def tell(self, *words: Any) -> None:
        """Rank 0 says what it does next."""
        dist.broadcast_object_list([words], src=0, group=self._words)

    def hear(self) -> tuple[Any, ...]:
        """The others wait for it."""
        words: list[Any] = [None]
        dist.broadcast_object_list(words, src=0, group=self._words)
        return tuple(words[0])

    def agreed(self, value: Item) -> Item:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._words)
        return values[0]

    def gathered(self, value: Item) -> list[Item]:
        """Everyone's values, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._words)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(group=self._words)

    def share(self, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
        """The items of this rank, as many as the others have: the last may be another's, which does not count (False)."""
        if self.size == 1:
            yield from ((item, True) for item in items)
            return
        found = list(items)
        for start in range(0, len(found), self.size):
            mine = start + self.rank
            yield found[min(mine, len(found) - 1)], mine < len(found)

    def leading(self, call: Callable[[], Result], *words: Any) -> Result:
        """Do what `call` does, on rank 0 after telling the others; calls within calls are theirs already."""
        if self.size == 1:
            return call()
        self._depth += 1
        try:
            if self.leads and self._depth == 1:
                self.tell(*words)
            return call()
        except RuntimeError as error:
            if "closed by peer" in str(error) or "Connection reset" in str(error):
                raise RankError(f"another rank ended while {words[0]!r} ran; its own output says why. --resume goes on") from error
            raise
        finally:
            self._depth -= 1


class _OnRanks(Protocol):
    ranks: Ranks


Learner = TypeVar("Learner", bound=_OnRanks)


def on_every_rank(
    method: Callable[Concatenate[Learner, Arguments], Result],
) -> Callable[Concatenate[Learner, Arguments], Result]:
    """A method that all ranks have to call together: called on rank 0, it is called on the others too."""

    def together(learner: Learner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return learner.ranks.leading(lambda: method(learner, *args, **kwargs), method.__name__, args, kwargs)

    functools.update_wrapper(together, method)
    return together


def follow(learner: _OnRanks) -> None:
    """Call what rank 0 calls, until it ends. Signals are for rank 0 to answer: it finishes the step and says so."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    while True:
        name, *rest = learner.ranks.hear()
        if name == END:
            return
        args, kwargs = rest
        answer = getattr(learner, name)(*args, **kwargs)
        if isinstance(answer, Iterator):
            for _ in answer:
                pass
