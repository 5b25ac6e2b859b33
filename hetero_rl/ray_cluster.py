"""The Ray cluster that ranks and engines are placed on: found, and large enough, before anything is started."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from typing import Any

from deploy_targets.errors import MissingPackageError, UsageError
from hetero_rl.config import RayConfig, RunConfig

CONNECT_TIMEOUT_S = 5.0


def check_cluster(config: RunConfig) -> None:
    """Raises `UsageError` where the config wants Ray and it is not installed, not there, or too small."""
    if not config.uses_ray:
        return
    ray, table = connect(config.ray), config.ray
    num_ranks = config.learner.num_ranks if config.learner.launcher == "ray" else 0
    has = ray.cluster_resources()
    for kind, per_rank, per_engine in (
        ("CPU", table.cpus_per_rank, table.cpus_per_engine),
        ("GPU", table.gpus_per_rank, table.gpus_per_engine),
    ):
        wanted = num_ranks * per_rank + config.num_ray_engines * per_engine
        if wanted > has.get(kind, 0):
            raise UsageError(
                f"the Ray cluster has {has.get(kind, 0):g} {kind}s, and {num_ranks} ranks of {per_rank} with {config.num_ray_engines} "
                f"engines of {per_engine} want {wanted}. Add nodes, or lower learner.num_ranks, the [[engines]], or what [ray] gives each"
            )


def connect(config: RayConfig) -> Any:
    """The module `ray`, connected to the cluster. Raises `UsageError` where there is none."""
    if find_spec("ray") is None:
        raise MissingPackageError("ray", "learner.launcher = 'ray' or [[engines]] with placement = 'ray'", "ray")
    address = config.address if config.address != "auto" else os.environ.get("RAY_ADDRESS", "auto")
    if address != "auto":
        _require_reachable(address)
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise UsageError(
                f"no Ray cluster at ray.address = {config.address!r}: {' '.join(str(error).split())}. Start one with `ray start --head`, "
                "or give the host:port of its head"
            ) from None
    return ray


def _require_reachable(address: str) -> None:
    """Ray itself would try for a minute, and end the process."""
    if "://" in address:
        raise UsageError(f"ray.address = {address!r} is for Ray's client, but rank 0 is a part of the cluster: run on one of its nodes")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"ray.address = {address!r} is not of the form host:port, e.g. 10.0.0.1:6379, nor `auto`")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"no Ray cluster at ray.address = {address!r}: {error}. `ray status` on a node shows the address") from None
