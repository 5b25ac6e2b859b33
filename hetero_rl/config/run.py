"""A whole run: the tree that all tables hang from, and what they may not say together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hetero_rl.config.learning import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.config.serving import EngineEntry, PoolConfig, RayConfig
from hetero_rl.config.table import Table
from hetero_rl.recipe import RecipeName
from hetero_rl.tasks.config import ArithmeticConfig, TaskConfig


class ModelConfig(Table):
    """`[model]`: where the high-fidelity weights come from."""

    path: str = "demo"
    """A folder or hub id of a transformers causal LM with safetensors weights; `demo` is the shipped tiny model."""


class TargetConfig(Table):
    """`[target]`: what the model is trained for."""

    name: str = "int4-onnx"
    """A name of `hetero-rl targets list`, or the path of your own profile (.toml)."""


class LoopConfig(Table):
    """`[loop]`: how long and how much."""

    num_steps: int = Field(120, ge=1)
    """Steps: rollouts, learner update, publish."""
    seed: int = Field(0, ge=0)
    """Everything random in a run follows from (seed, step)."""
    prompts_per_step: int = Field(32, ge=1)
    """Problems per step."""
    samples_per_prompt: int = Field(8, ge=2)
    """Responses per problem: the group that advantages are computed in."""
    resample_rounds: int = Field(0, ge=0)
    """Times that, within a step, problems whose responses all earned the same reward are replaced by others (dynamic sampling)."""
    max_response_tokens: int = Field(64, ge=1)
    """Longest response."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the learner's log-probs are taken at the same one."""
    schedule: Literal["sync", "one_step_off"] = "sync"
    """`sync`: sampling and learning take turns; `one_step_off`: the engine samples for the next step while the learner works on this one,
    with weights that are one update old."""
    publish_every: int = Field(1, ge=1)
    """Steps between publishes of the learner's weights to the engine."""
    publish_gate: float | None = Field(None, gt=0)
    """Undo a step after which the engine's gap on the step's own rollouts is more than this many times what it was before; unset: never."""

    def publishes(self, step: int) -> bool:
        """Whether the weights after `step` steps are published."""
        return step % self.publish_every == 0 or step == self.num_steps


class CheckpointConfig(Table):
    """`[checkpoint]`: what a kill may cost."""

    every_steps: int = Field(50, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the one of the highest deployed accuracy too, among those of steps that were evaluated (`export --checkpoint best`)."""


class EvaluationConfig(Table):
    """`[evaluation]`: accuracy on held-out problems, greedy, on the engine and on the learner."""

    every_steps: int = Field(20, ge=1)
    """Steps between evaluations; the first comes before any update, one more after the last."""
    num_problems: int = Field(500, ge=1)
    """Held-out problems of an evaluation while training."""
    num_final_problems: int = Field(1000, ge=1)
    """Held-out problems of the first and the last evaluation, and of the task sample in the artifact."""


class RunConfig(Table):
    """A whole run."""

    recipe: RecipeName = "auto"
    """Settings that lie below all others. `auto`: by the target, `rounded` where its weights cost accuracy, `grey_box` where its cache
    does, `guard` where they hardly do, `plain` where nothing is rounded; `none`: the defaults below. Whoever sets `constraint.signal`
    gets no other setting of a recipe."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = Field(default_factory=ArithmeticConfig)
    target: TargetConfig = TargetConfig()
    learner: LearnerConfig = LearnerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    constraint: ConstraintConfig = ConstraintConfig()
    loop: LoopConfig = LoopConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engines: tuple[EngineEntry, ...] = ()
    """Tables `[[engines]]`, see below: none is one engine on this machine."""
    pool: PoolConfig = PoolConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def centering_needs_two_weights(self) -> RunConfig:
        """A learner that runs the rounded weights itself has no drift that its twin knows of."""
        if self.algorithm.score_centering and self.learner.forward == "fake_quant":
            raise ValueError("algorithm.score_centering has nothing to centre where learner.forward = 'fake_quant'; use one of them")
        return self

    @model_validator(mode="after")
    def noise_is_about_the_bf16_weights(self) -> RunConfig:
        """With flatness the twin's errors are random: nothing that wants the target's own can use it."""
        users = [
            name
            for name, used in (
                ("learner.forward = 'fake_quant'", self.learner.forward == "fake_quant"),
                ("algorithm.score_centering", self.algorithm.score_centering),
            )
            if used
        ]
        if self.constraint.signal == "flatness" and users:
            raise ValueError(
                f"constraint.signal = 'flatness' gives the rounding errors random signs, and {' and '.join(users)} needs the target's own; "
                "use constraint.signal = 'grey_box'"
            )
        return self

    @model_validator(mode="after")
    def enough_engines_are_named(self) -> RunConfig:
        """A pool that can never be large enough stops at once."""
        if self.engines and self.num_engines < self.pool.min_engines:
            raise ValueError(f"pool.min_engines = {self.pool.min_engines} is more than the {self.num_engines} [[engines]]")
        return self

    @property
    def num_engines(self) -> int:
        """Engines that make the rollouts."""
        return sum(entry.count for entry in self.engines) or 1

    @property
    def num_ray_engines(self) -> int:
        """Those of them that Ray places."""
        return sum(entry.count for entry in self.engines if entry.placement == "ray")

    @property
    def uses_ray(self) -> bool:
        """Whether anything runs on a Ray cluster."""
        return self.learner.launcher == "ray" or self.num_ray_engines > 0

    @model_validator(mode="after")
    def updates_divide_the_prompts(self) -> RunConfig:
        """Each update gets its own share of the problems."""
        if self.loop.prompts_per_step % self.learner.updates_per_rollout:
            raise ValueError(
                f"loop.prompts_per_step = {self.loop.prompts_per_step} cannot be split into learner.updates_per_rollout = "
                f"{self.learner.updates_per_rollout} equal shares"
            )
        return self

    @model_validator(mode="after")
    def checkpoints_follow_a_publish(self) -> RunConfig:
        """A checkpoint holds one set of weights: the learner's, which must then be the engine's too."""
        if self.checkpoint.every_steps % self.loop.publish_every:
            raise ValueError(
                f"checkpoint.every_steps = {self.checkpoint.every_steps} must be a multiple of "
                f"loop.publish_every = {self.loop.publish_every}"
            )
        if self.constraint.floor_every % self.loop.publish_every:
            raise ValueError(
                f"constraint.floor_every = {self.constraint.floor_every} must be a multiple of loop.publish_every = "
                f"{self.loop.publish_every}: a floor is the gap of the same weights"
            )
        if self.loop.publish_gate is not None and (self.loop.publish_every > 1 or self.learner.zero_stage == 3):
            raise ValueError(
                "loop.publish_gate judges and undoes single steps: it needs loop.publish_every = 1 and a copy of the master weights, which "
                f"learner.zero_stage = 3 cannot hold (they are {self.loop.publish_every} and {self.learner.zero_stage})"
            )
        if self.loop.publish_gate is not None and self.algorithm.routing_replay:
            raise ValueError(
                "loop.publish_gate compares the gap before a step with one after it, for which no engine gives routes: it cannot be had "
                "with algorithm.routing_replay"
            )
        if self.loop.schedule == "one_step_off" and (
            self.loop.publish_every > 1 or self.loop.publish_gate is not None or self.learner.zero_stage == 3
        ):
            raise ValueError(
                "loop.schedule = 'one_step_off' keeps a copy of the weights before each update and publishes every one: it goes with "
                "loop.publish_every = 1, without loop.publish_gate, and with learner.zero_stage up to 2"
            )
        if self.loop.publish_every > 1 and self.learner.zero_stage == 3:
            raise ValueError(
                "loop.publish_every > 1 keeps a copy of the published weights, which learner.zero_stage = 3 cannot hold; use stage 2"
            )
        return self
