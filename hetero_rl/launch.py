"""Ranks that no launcher started: on a Ray cluster, with rank 0 in this process, where the loop is.

    this process   rank 0: loop.py
    actors         rank 1.. : follow what rank 0 calls (learner/ranks.py), as under torchrun

One placement group holds the room for all of them, so that either all start or none; its first part lies on this node, for rank 0.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from deploy_targets.catalog import make_quantizer
from deploy_targets.profile import TargetProfile
from hetero_rl.config import RunConfig
from hetero_rl.errors import RankError
from hetero_rl.inputs import check_inputs
from hetero_rl.ray_cluster import connect

LAST_WORDS_S = 10.0
"""How long ranks may take to end by themselves, or Ray to say why one did."""


def quieten() -> None:
    """Before anything heavy is imported: libraries' chatter off the screen, and threads that wait without burning a core.

    Learner and engine take turns on the same cores; OpenMP threads that spin between turns slow the other side down.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(torch|transformers|deepspeed|tensorboard)\.")


def follow_run(config: RunConfig, profile: TargetProfile, store: Any = None) -> None:
    """The part of every rank but the first: its share of what rank 0 has its learner do. It writes and prints nothing.

    `store`: where the ranks meet, if not where a launcher says.
    """
    inputs = check_inputs(config, profile)
    from hetero_rl.learner.deepspeed_engine import backend
    from hetero_rl.learner.ranks import follow, meet
    from hetero_rl.parts import make_learner

    meet(backend(), store)
    learner = make_learner(config, profile, inputs, make_quantizer(profile, inputs.model_dir))
    follow(learner)
    learner.close()


class _Rank:
    """The actor of one rank."""

    def follow(self, rank: int, folder: str, variables: Mapping[str, str], config: str, profile: str) -> None:
        quieten()
        # Paths of config and checkpoints may be relative to where the command was given.
        os.chdir(folder)
        os.environ.update({**variables, "RANK": str(rank)})
        run, target = RunConfig.model_validate_json(config), TargetProfile.model_validate_json(profile)
        check_inputs(run, target)
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), is_master=False)
        store.set(_here(rank), "")
        follow_run(run, target, store)


@contextmanager
def ranks_on_ray(config: RunConfig, profile: TargetProfile) -> Iterator[None]:
    """This process is rank 0 of `learner.num_ranks`, the others are actors: within the context, a `Learner` is one on all of them.

    Raises `RankError` where the cluster has no room for them, and, with what Ray knows of it, where one ends.
    """
    ray, table, num_ranks = connect(config.ray), config.ray, config.learner.num_ranks
    host = str(ray.util.get_node_ip_address())
    room = {"CPU": float(table.cpus_per_rank), "GPU": float(table.gpus_per_rank)}
    # Every node has 1 of itself: the first room is on this one.
    group = ray.util.placement_group([room | {f"node:{host}": 0.001}, *[room] * (num_ranks - 1)], strategy="PACK")
    actors: list[Any] = []
    try:
        if not group.wait(table.start_timeout_s):
            raise RankError(
                f"the Ray cluster had no room for {num_ranks} ranks of {table.cpus_per_rank} CPUs and {table.gpus_per_rank} GPUs within "
                f"ray.start_timeout_s = {table.start_timeout_s:g}, the first of them on this node: others hold it, or no node is large "
                "enough (`ray status`)"
            )
        rooms = [_in_room(ray, group, rank, room) for rank in range(num_ranks)]
        if table.gpus_per_rank:
            own = ray.get(ray.remote(_own_gpus).options(**rooms[0]).remote())
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        variables = {"WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0", "MASTER_ADDR": host, "MASTER_PORT": str(store.port)}
        actors += [ray.remote(_Rank).options(**options).remote() for options in rooms[1:]]
        given = os.getcwd(), variables, config.model_dump_json(), profile.model_dump_json()
        ends = [actor.follow.remote(rank, *given) for rank, actor in enumerate(actors, 1)]
        try:
            _await(ray, ends, store, table.start_timeout_s)
            os.environ.update({**variables, "RANK": "0"})
            from hetero_rl.learner.deepspeed_engine import backend
            from hetero_rl.learner.ranks import meet

            meet(backend(), store)
            yield
        except Exception as error:
            # What fails here first may be a checkpoint, a publish or the process group, and is none of their faults.
            _raise_if_ended(ray, ends, LAST_WORDS_S, error)
            raise
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=LAST_WORDS_S)
    finally:
        for actor in actors:
            ray.kill(actor)
        ray.util.remove_placement_group(group)


def _in_room(ray: Any, group: Any, index: int, room: Mapping[str, float]) -> dict[str, Any]:
    """The options of a task or actor that has one room of the group to itself."""
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": room["CPU"], "num_gpus": room["GPU"], "scheduling_strategy": strategy}


def _own_gpus() -> list[str]:
    import ray

    return [str(gpu) for gpu in ray.get_gpu_ids()]


def _here(rank: int) -> str:
    return f"rank {rank} is here"


def _await(ray: Any, ends: Sequence[Any], store: Any, timeout_s: float) -> None:
    """Until every rank is about to join: who waits within `join` learns of no rank that ended before it came.

    Raises `RankError` for one that ended, or did not come within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    for rank in range(1, len(ends) + 1):
        while not store.check([_here(rank)]):
            _raise_if_ended(ray, ends, 0.2)
            if time.monotonic() > deadline:
                raise RankError(f"rank {rank} did not start on Ray within ray.start_timeout_s = {timeout_s:g}")


def _raise_if_ended(ray: Any, ends: Sequence[Any], timeout_s: float, seen_as: Exception | None = None) -> None:
    """Raises `RankError` where a rank ended with an error, or does within `timeout_s`."""
    if not ends:
        return
    for end in ray.wait(list(ends), timeout=timeout_s)[0]:
        try:
            ray.get(end)
        except ray.exceptions.RayError as error:
            from deploy_targets.engines.on_ray import reason

            raise RankError(
                f"rank {list(ends).index(end) + 1} on Ray ended: {reason(error)}. --resume goes on from the last checkpoint"
            ) from seen_as
