"""`[[engines]]`, `[pool]`, `[ray]`: what makes the rollouts, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hetero_rl.config.table import Table


class EngineEntry(Table):
    """`[[engines]]`: an engine of the pool that makes the rollouts. Without any there is one, on this machine."""

    url: str | None = None
    """Address of a `hetero-rl target-agent`, or of the `server`; unset: on this machine, in a process of its own."""
    server: Literal["agent", "vllm"] = "agent"
    """What answers at `url`: `vllm` is a vLLM server that runs already and is given the weights by its RL endpoints."""
    token_file: Path | None = None
    """File that holds the agent's token, or the server's `--api-key` where it has one."""
    ca_file: Path | None = None
    """Certificate (PEM) that the agent's or server's is signed by, where that is not one this machine trusts."""
    folder: Path | None = None
    """With `server = "vllm"`: folder on a filesystem that the server sees too, for the weights; unset: `updates` in the run folder."""
    folder_there: str | None = None
    """The path of `folder` on the server's machine, where it is another."""
    count: int = Field(1, ge=1)
    """So many of them, without `url`."""
    placement: Literal["here", "ray"] = "here"
    """Without `url`: `here`, on this machine; `ray`, wherever the cluster of `[ray]` has room."""

    @model_validator(mode="after")
    def an_address_is_one_agent(self) -> EngineEntry:
        """A count of one address, or a token for this very process, would be ignored."""
        if self.url is not None and self.count > 1:
            raise ValueError("one url is one agent: leave out count, and give each agent its own [[engines]]")
        fields = ("server", "token_file", "ca_file", "folder", "folder_there")
        # Against the defaults: a config that was written whole and read again has all fields set.
        given = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if self.url is None and given:
            raise ValueError(f"{' and '.join(given)} belong to an agent or a server: give its url")
        if self.url is not None and self.server == "agent":
            if self.token_file is None:
                raise ValueError('an agent wants its token: give token_file, or server = "vllm" where a vLLM server answers')
            if self.folder or self.folder_there:
                raise ValueError('an agent is sent the weights: folder and folder_there are for server = "vllm"')
        if self.folder_there is not None and self.folder is None:
            raise ValueError("folder_there is the path of a folder: give folder, its path on this machine")
        if self.url is not None and self.placement == "ray":
            raise ValueError("an agent or a server is where its url says: leave out placement")
        return self


class PoolConfig(Table):
    """`[pool]`: how the `[[engines]]` work together."""

    min_engines: int = Field(1, ge=1)
    """With fewer that serve, the run saves a checkpoint and stops."""
    deadline_s: float = Field(3600.0, gt=0)
    """An engine that takes longer for an answer counts as hung: it is taken out."""
    restart_after_s: float = Field(5.0, ge=0)
    """Pause before an engine that was taken out is started anew, doubled with each failure in a row."""
    requests_per_engine: int = Field(4, ge=1)
    """Requests that a batch of rollouts is cut into, for each engine: more even out their speeds, fewer make larger batches."""


class RayConfig(Table):
    """`[ray]`: the cluster for `learner.launcher = "ray"` and for `[[engines]]` with `placement = "ray"`. It has to run already."""

    address: str = "auto"
    """host:port of its head; `auto`: $RAY_ADDRESS, else the one that this machine belongs to."""
    cpus_per_rank: int = Field(1, ge=1)
    """CPUs that Ray reserves for each rank, and the threads it computes with."""
    gpus_per_rank: int = Field(0, ge=0, le=1)
    """GPUs of each rank."""
    cpus_per_engine: int = Field(1, ge=1)
    """CPUs that Ray reserves for each engine; its threads are the target's `engine.options.num_threads`."""
    gpus_per_engine: int = Field(0, ge=0)
    """GPUs of each engine."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for the ranks, and for an engine, until the cluster has room and they are there."""
