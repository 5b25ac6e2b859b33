"""An engine wherever a Ray cluster has room: an actor holds it in a process of its own, and dies with it.

Weights are read from the folder of the run, which every node sees under the same path; tokens and log-probs travel through Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError

from deploy_targets.catalog import open_engine
from deploy_targets.engines.wire import pack_error, unpack_error
from deploy_targets.errors import EngineError
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Engine
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile


class _Holder:
    """The actor. An error goes back by the name of its class: not every one of ours can be pickled."""

    def __init__(self) -> None:
        self._engine: Engine | None = None

    def start(self, profile: Mapping[str, Any], folder: str, weight_version: int) -> tuple[Any, dict[str, Any] | None]:
        try:
            if not Path(folder).is_dir():
                raise EngineError(f"node {ray.util.get_node_ip_address()} does not see {folder}: the nodes must share the run's disk")
            self._engine = open_engine(TargetProfile.model_validate(profile), Path(folder), weight_version)
        except Exception as error:
            return None, pack_error(error)
        return None, None

    def call(self, name: str, *arguments: Any) -> tuple[Any, dict[str, Any] | None]:
        assert self._engine is not None, "the first call starts the engine"
        try:
            return getattr(self._engine, name)(*arguments), None
        except Exception as error:
            return None, pack_error(error)


class RayEngine:
    """The engine protocol over a Ray actor; this process is connected to the cluster already."""

    def __init__(
        self,
        profile: TargetProfile,
        artifact_dir: Path,
        weight_version: int,
        *,
        num_cpus: int = 1,
        num_gpus: int = 0,
        start_timeout_s: float = 600.0,
        call_timeout_s: float = 3600.0,
    ) -> None:
        """Have the cluster place and start the engine.

        Raises what the engine's constructor raises, and `EngineError` when there is no room within `start_timeout_s` or the actor dies;
        `call_timeout_s` bounds every later call in the same way.
        """
        self.weight_version = weight_version
        self._name, self._call_timeout_s = profile.engine.name, call_timeout_s
        self._lock = threading.Lock()
        self._actor: Any = ray.remote(_Holder).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0).remote()
        try:
            self._ask("start", start_timeout_s, profile.model_dump(mode="json"), str(Path(artifact_dir).resolve()), weight_version)
        except BaseException:
            self.close()
            raise

    def update(self, weights: WeightFile) -> int:
        """Have the actor's engine load the file."""
        self.weight_version = int(self._ask("update", self._call_timeout_s, WeightFile(weights.path.resolve(), weights.weight_version)))
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Have the actor's engine sample."""
        return cast("list[Generation]", self._ask("generate", self._call_timeout_s, [tuple(prompt) for prompt in prompts], sampling))

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Have the actor's engine score."""
        return cast("list[TokenScores]", self._ask("score", self._call_timeout_s, list(sequences), temperature))

    def close(self) -> None:
        """End the actor, and with it the engine's process."""
        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized():
            ray.kill(actor)

    def _ask(self, call: str, timeout_s: float, *arguments: Any) -> Any:
        with self._lock:
            if self._actor is None:
                raise EngineError(f"this {self._name} engine on Ray is closed")
            asked = self._actor.start.remote(*arguments) if call == "start" else self._actor.call.remote(call, *arguments)
            try:
                answer, error = ray.get(asked, timeout=timeout_s)
            except GetTimeoutError:
                self.close()
                free = "; the cluster may have no room for it (`ray status`)" if call == "start" else ""
                raise EngineError(f"engine {self._name!r} on Ray did not answer {call!r} within {timeout_s:g} s{free}") from None
            except RayError as failure:
                self.close()
                raise EngineError(f"engine {self._name!r} on Ray died during {call!r}: {reason(failure)}") from failure
        if error is None:
            return answer
        raise unpack_error(error) or EngineError(f"engine {self._name!r} on Ray raised {error['class']} in {call!r}: {error['message']}")


def reason(error: RayError) -> str:
    """What Ray knows, in a line: the error at the end of a task's traceback, or how an actor died, without advice."""
    said = str(error).strip()
    if "Traceback" in said:
        said = said.splitlines()[-1]
    return " ".join(said.partition("Some common causes")[0].split()).rstrip(".")
