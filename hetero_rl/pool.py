"""From `[[engines]]` to the engine that a run is served by: one, or a pool of them here and elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from deploy_targets.catalog import open_engine
from deploy_targets.engines.checked import CheckedEngine
from deploy_targets.engines.outbox import Outbox
from deploy_targets.engines.pool import Place, PoolEngine, PoolRules
from deploy_targets.errors import UsageError
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Engine
from hetero_rl.config import EngineEntry, RunConfig
from hetero_rl.ray_cluster import connect

StartEngine = Callable[[Path, int], Engine]
"""(folder in the engine's native format, weight_version) -> a running engine."""


def engine_starter(config: RunConfig, profile: TargetProfile, vocab_size: int, say: Callable[[str], None]) -> StartEngine:
    """What starts the engine; `say` is told who of a pool is out or back. Answers are checked, up to the `vocab_size` of the learner.

    Raises `UsageError` for a token file that cannot be read, and for a vLLM server in the pool of a target of another engine.
    """
    if not config.engines:
        return _checked(partial(open_engine, profile), vocab_size)
    pool, places = config.pool, [Place(name, _checked(start, vocab_size)) for name, start in _places(config, profile)]
    rules = PoolRules(pool.min_engines, pool.requests_per_engine, pool.restart_after_s)
    return lambda folder, weight_version: PoolEngine(places, folder, weight_version, rules=rules, say=say)


def pool_row(engine: Engine) -> dict[str, float]:
    """The metrics of a pool; none of an engine by itself."""
    if not isinstance(engine, PoolEngine):
        return {}
    return {"engines/serving": engine.num_serving, "engines/resent": engine.num_resent, "engines/restarts": engine.num_restarts}


def _checked(start: StartEngine, vocab_size: int) -> StartEngine:
    return lambda folder, weight_version: CheckedEngine(start(folder, weight_version), weight_version, vocab_size)


def _places(config: RunConfig, profile: TargetProfile) -> Iterator[tuple[str, StartEngine]]:
    # A process of its own can be killed and can hang without the others.
    here = profile.model_copy(update={"engine": profile.engine.model_copy(update={"process": "own"})})
    num_here = num_on_ray = 0
    outbox = Outbox()
    for entry in config.engines:
        if entry.url is not None:
            yield entry.url, _remote(entry.url, entry, profile, config.pool.deadline_s, outbox)
            continue
        for _ in range(entry.count if entry.placement == "ray" else 0):
            num_on_ray += 1
            yield f"ray {num_on_ray}", partial(_on_ray, config, here)
        for _ in range(entry.count if entry.placement == "here" else 0):
            num_here += 1
            yield f"local {num_here}", partial(open_engine, here, call_timeout_s=config.pool.deadline_s)


def _on_ray(config: RunConfig, profile: TargetProfile, folder: Path, weight_version: int) -> Engine:
    connect(config.ray)
    from deploy_targets.engines.on_ray import RayEngine

    return RayEngine(
        profile,
        folder,
        weight_version,
        num_cpus=config.ray.cpus_per_engine,
        num_gpus=config.ray.gpus_per_engine,
        start_timeout_s=config.ray.start_timeout_s,
        call_timeout_s=config.pool.deadline_s,
    )


def _remote(url: str, entry: EngineEntry, profile: TargetProfile, deadline_s: float, outbox: Outbox) -> StartEngine:
    token = None if entry.token_file is None else _read_token(url, entry.token_file)
    if entry.server == "vllm":
        return _vllm_server(url, token, entry, profile, deadline_s)
    assert token is not None

    def start(folder: Path, weight_version: int) -> Engine:
        from deploy_targets.engines.remote import RemoteEngine

        return RemoteEngine(
            profile, folder, weight_version, url=url, token=token, ca_file=entry.ca_file, call_timeout_s=deadline_s, outbox=outbox
        )

    return start


def _vllm_server(url: str, api_key: str | None, entry: EngineEntry, profile: TargetProfile, deadline_s: float) -> StartEngine:
    if profile.engine.name != "vllm":
        raise UsageError(f"target {profile.name!r} is for {profile.engine.name}, not for the vLLM server at {url}; take a vLLM target")
    if profile.engine.publish == "rebuild":
        raise UsageError(f"target {profile.name!r} rebuilds its engine for every update, and the vLLM server at {url} is not ours to start")

    def start(folder: Path, weight_version: int) -> Engine:
        from deploy_targets.engines.remote_vllm import RemoteVllmEngine

        return RemoteVllmEngine(
            profile, folder, weight_version, url=url, api_key=api_key, ca_file=entry.ca_file,
            folder=entry.folder, folder_there=entry.folder_there, call_timeout_s=deadline_s,
        )  # fmt: skip

    return start


def _read_token(url: str, path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file {path} of engine {url} cannot be read: {getattr(error, 'strerror', None) or error}") from None
