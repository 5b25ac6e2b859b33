"""What a step takes on machines that are not here: measured costs where there are some, and hardware.toml for all else."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.scaling.model import Cluster, Costs, Decode, Step, Workload, simulate

HARDWARE = Path(__file__).with_name("hardware.toml")
SIZES = (8, 32, 128, 1024)
NUM_LENGTHS = 2000


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkloadSpec(_Table):
    """`[workload]`."""

    num_prompts: int = Field(ge=1)
    group_size: int = Field(ge=1)
    prompt_tokens: float = Field(gt=0)
    mean_response_tokens: float = Field(gt=0)
    response_shape: str = Field(pattern="^(measured|lognormal)$")
    lognormal_sigma: float = Field(gt=0)
    taught_share: float = Field(ge=0, le=1)
    update_factor: float = Field(gt=0)
    reward_s: float = Field(ge=0)
    requests_per_engine: int = Field(ge=1)


class LearnerSpec(_Table):
    """`[learner]`."""

    flop_s: float = Field(gt=0)
    utilisation: float = Field(gt=0, le=1)
    memory_bytes_s: float = Field(gt=0)
    interconnect_bytes_s: float = Field(gt=0)
    host_cores: float = Field(gt=0)
    nic_bytes_s: float = Field(gt=0)


class TargetSpec(_Table):
    """`[target]`."""

    bytes_per_parameter: float = Field(gt=0)
    probe_tokens: float = Field(gt=0)
    load_bytes_s: float = Field(gt=0)


class EngineSpec(_Table):
    """`[engines.NAME]`."""

    what: str
    memory_bytes: float = Field(gt=0)
    memory_bytes_s: float = Field(gt=0)
    flop_s: float = Field(gt=0)
    utilisation: float = Field(gt=0, le=1)
    max_batch: int = Field(ge=1)
    link_bytes_s: float = Field(gt=0)
    latency_s: float = Field(ge=0)


class ModelSpec(_Table):
    """`[models.NAME]`."""

    parameters: float = Field(gt=0)
    cache_bytes_per_token: float = Field(gt=0)
    accelerators: int = Field(ge=1)


class Hardware(_Table):
    """The whole file."""

    workload: WorkloadSpec
    learner: LearnerSpec
    target: TargetSpec
    engines: dict[str, EngineSpec]
    models: dict[str, ModelSpec]


class Measured(_Table):
    """What the plan takes from measurements made here. `relative_lengths`: of responses, over their mean."""

    relative_lengths: tuple[float, ...]
    delta_share: float
    """Bytes of a difference over those of the file (delta_updates.json)."""
    quantize_parameters_s: float
    """Parameters that a core rounds in a second (publish_targets.json)."""
    pack_bytes_s: float
    """Bytes of a file that a core hashes and makes a difference of, in a second."""
    unpack_bytes_s: float
    """The way back, hashed again."""


def read_hardware(path: Path = HARDWARE) -> Hardware:
    """Raises `pydantic.ValidationError` naming every key that is wrong."""
    return Hardware.model_validate(tomllib.loads(path.read_text("utf-8")))


@dataclass(frozen=True)
class Scenario:
    """One model on so many engines of one kind."""

    hardware: Hardware
    measured: Measured
    model: str
    engine: str
    num_engines: int
    schedule: str = "sync"

    @property
    def weight_bytes(self) -> float:
        """Of the file that an engine serves."""
        return self.hardware.models[self.model].parameters * self.hardware.target.bytes_per_parameter

    @property
    def max_batch(self) -> int:
        """Responses whose cache an engine has room for; 0: not even the weights fit."""
        engine, work = self.hardware.engines[self.engine], self.hardware.workload
        a_response = self.hardware.models[self.model].cache_bytes_per_token * (work.prompt_tokens + work.mean_response_tokens)
        return int(max(0, min(engine.max_batch, (engine.memory_bytes - self.weight_bytes) // a_response)))

    def workload(self) -> Workload:
        """With the lengths measured here, scaled; or log-normal ones of the same mean."""
        work = self.hardware.workload
        if work.response_shape == "measured":
            relative = np.array(self.measured.relative_lengths)
        else:
            relative = np.random.default_rng(0).lognormal(0.0, work.lognormal_sigma, NUM_LENGTHS)
        lengths = np.maximum(1, np.round(relative / relative.mean() * work.mean_response_tokens)).astype(int)
        return Workload(work.num_prompts, work.group_size, work.prompt_tokens, tuple(lengths.tolist()), work.taught_share)

    def costs(self) -> Costs:
        """Bytes over bandwidths and operations over rates."""
        hardware, measured = self.hardware, self.measured
        work, learner, target = hardware.workload, hardware.learner, hardware.target
        engine, model = hardware.engines[self.engine], hardware.models[self.model]
        bandwidth, flop_s = engine.memory_bytes_s * engine.utilisation, engine.flop_s * engine.utilisation
        flop = 2 * model.parameters  # of a token forward; backward is twice that
        context = work.prompt_tokens + work.mean_response_tokens / 2
        read_s, token_s = self.weight_bytes / bandwidth, flop / flop_s + model.cache_bytes_per_token * context / bandwidth
        largest = max(2, self.max_batch)
        decode = Decode(
            (1, largest), (read_s + token_s, read_s + largest * token_s), 0.0, work.prompt_tokens / work.group_size * flop / flop_s, largest
        )
        rate = learner.flop_s * learner.utilisation
        quantize_s = model.parameters / (measured.quantize_parameters_s * learner.host_cores)
        return Costs(
            decode=decode,
            reward_s=work.reward_s,
            # fp32 masters and two averages are read and written, gradients and bf16 weights beside them; ZeRO spreads all of it.
            learner_fixed_s=28 * model.parameters / model.accelerators / learner.memory_bytes_s,
            forward_s=flop / rate,
            train_s=3 * flop / rate * work.update_factor,
            old_logp_s=flop / rate,
            reduce_s=2 * 2 * model.parameters / learner.interconnect_bytes_s,
            quantize_s=quantize_s,
            pack_s=self.weight_bytes / measured.pack_bytes_s,
            update_bytes=self.weight_bytes * measured.delta_share,
            load_s=self.weight_bytes * (1 / measured.unpack_bytes_s + 1 / target.load_bytes_s),
            # The twin rounds the weights for itself.
            twin_s=quantize_s + flop * target.probe_tokens / (rate * model.accelerators),
            score_s=read_s + flop * target.probe_tokens / flop_s,
        )

    def cluster(self) -> Cluster:
        """Each engine and each accelerator by itself."""
        learner, engine = self.hardware.learner, self.hardware.engines[self.engine]
        return Cluster(
            self.num_engines, self.hardware.models[self.model].accelerators, self.schedule, self.hardware.workload.requests_per_engine,
            host_cores=learner.host_cores, nic=learner.nic_bytes_s, link=engine.link_bytes_s, latency_s=engine.latency_s,
        )  # fmt: skip

    def step(self) -> Step:
        """What the simulation says of it."""
        return simulate(self.costs(), self.cluster(), self.workload(), num_steps=1)

    def doubled(self) -> Iterator[tuple[str, Scenario]]:
        """The same with twice of one thing that can be bought, or set."""
        hardware = self.hardware
        learner, model, engine = hardware.learner, hardware.models[self.model], hardware.engines[self.engine]

        def having(**change: Any) -> Scenario:
            return replace(self, hardware=hardware.model_copy(update=change))

        yield "engines", replace(self, num_engines=2 * self.num_engines)
        more = {"memory_bytes_s": 2 * engine.memory_bytes_s, "flop_s": 2 * engine.flop_s}
        yield "faster engines", having(engines={**hardware.engines, self.engine: engine.model_copy(update=more)})
        more_accelerators = model.model_copy(update={"accelerators": 2 * model.accelerators})
        yield "accelerators", having(models={**hardware.models, self.model: more_accelerators})
        yield "cores of the learner's host", having(learner=learner.model_copy(update={"host_cores": 2 * learner.host_cores}))
        yield "network of the learner's host", having(learner=learner.model_copy(update={"nic_bytes_s": 2 * learner.nic_bytes_s}))


def critical(step: Step, costs: Costs, cluster: Cluster) -> dict[str, float]:
    """Seconds of a step by what they are spent on; what runs beside something longer counts nothing."""
    made, learned = step.rollout + step.reward, step.learn
    rollout, learn = (1.0, 1.0) if cluster.schedule == "sync" else (float(made >= learned), float(made < learned))
    engines = cluster.num_engines
    sides = {
        "publish network": max(costs.update_bytes / cluster.link, engines * costs.update_bytes / cluster.nic),
        "load": costs.load_s,
    }
    slowest = max(sides, key=lambda name: sides[name])
    return {
        "decode": rollout * step.decode,
        "stragglers": rollout * step.stragglers,
        "reward": rollout * step.reward,
        "learner": learn * learned,
        "quantize": step.quantize,
        "differences": costs.pack_s,
        slowest: step.update - costs.pack_s,
        "proof": step.proof,
    }


def entry(scenario: Scenario) -> dict[str, Any]:
    """A line of the plan: seconds, what they are spent on, and what doubling one thing would save (share of the step)."""
    step, beside = scenario.step(), replace(scenario, schedule="one_step_off").step()
    spent = critical(step, scenario.costs(), scenario.cluster())
    saved = {what: 1 - other.step().step / step.step for what, other in scenario.doubled()}
    saved["loop.schedule = one_step_off"] = 1 - beside.step / step.step
    return {
        "engine": scenario.engine,
        "model": scenario.model,
        "num_engines": scenario.num_engines,
        "step_s": step.step,
        "one_step_off_s": beside.step,
        "spent_s": spent,
        "bottleneck": max(spent, key=lambda name: spent[name]),
        "saved": saved,
        "max_batch": scenario.max_batch,
    }


def plan(hardware: Hardware, measured: Measured, sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """All engines, models and sizes; models whose weights an engine has no room for are left out."""
    scenarios = [
        Scenario(hardware, measured, model, engine, size) for engine in hardware.engines for model in hardware.models for size in sizes
    ]
    return [entry(scenario) for scenario in scenarios if scenario.max_batch]
