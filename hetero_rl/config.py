"""The config tree: one owner per value, unknown keys refused, every field explained under it.

A run is described by TOML files (later ones win over earlier ones) and `--set table.key=value` over both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy_targets.errors import ProfileError, UsageError
from deploy_targets.profile import TargetProfile, load_profile, validation_lines
from hetero_rl.algorithm.kinds import (
    CENTERED,
    DEFAULT_BOUNDS,
    DEFAULT_CLIPS,
    PAIRED,
    AdvantageForm,
    AdvantageKind,
    Aggregation,
    Bounds,
    Centered,
    ClipRange,
    Correction,
    GreyBoxForm,
    Measure,
    Normalization,
    PolicyLoss,
    Signal,
)
from hetero_rl.recipe import RecipeName, recipe_settings
from hetero_rl.tasks.config import ArithmeticConfig, DatasetConfig, TaskConfig

BF16_GAP = 0.004
"""Mean abs(dp) that two computations in bf16 differ by, about."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Table):
    """`[model]`: where the high-fidelity weights come from."""

    path: str = "demo"
    """A folder or hub id of a transformers causal LM with safetensors weights; `demo` is the shipped tiny model."""


class TargetConfig(_Table):
    """`[target]`: what the model is trained for."""

    name: str = "int4-onnx"
    """A name of `hetero-rl targets list`, or the path of your own profile (.toml)."""


class LearnerConfig(_Table):
    """`[learner]`: the DeepSpeed side."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(5, ge=0)
    """Optimizer steps of linear warm-up."""
    lr_final_ratio: float = Field(0.1, ge=0, le=1)
    """The cosine ends at this share of `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping by global norm."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where DeepSpeed keeps master weights and optimizer state: on the GPU, in the CPU's memory (ZeRO 1 to 3), or on a disk (ZeRO 3).
    On a machine without a GPU, `cpu` is where they are anyway."""
    offload_weights: bool = False
    """Keep the bf16 weights there too, fetched layer by layer; ZeRO 3."""
    nvme_path: Path | None = None
    """Folder on a fast local disk, for `offload = "nvme"`; needs libaio."""
    launcher: Literal["none", "ray"] = "none"
    """What starts the other ranks: nothing, or the torchrun or deepspeed that the command runs under; or `ray`, on a cluster that runs
    already (`[ray]`), with rank 0 in this process."""
    num_ranks: int = Field(1, ge=1)
    """Ranks, with `launcher = "ray"`; other launchers are told on their own command line."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the forward and backward pass; the weights are bf16 always. `auto`: float32 on a CPU whose bf16 products are not
    clearly faster (measured at the start), for models of linear layers and RMSNorms; else bfloat16. float32 is more exact and takes
    twice the memory for activations."""
    forward: Literal["bf16", "fake_quant"] = "bf16"
    """What the policy loss is computed with: the bf16 weights, or the values that the target rounds them to, the gradient passed straight
    through the rounding. With `fake_quant` the constraint bounds what is left: kernels, activations, KV cache. The bf16 weights
    by themselves are then not trained to be good."""
    tokens_per_micro_batch: int = Field(8192, ge=16)
    """Most tokens of one forward pass, padding included; a prompt that several responses share counts once where it is computed once."""
    logit_chunk_elements: int = Field(32_000_000, ge=1024)
    """Most logits (tokens x vocabulary) held at a time; the rest is recomputed in the backward pass."""
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer steps per rollout batch, each on its own share of the responses."""
    max_skipped_in_a_row: int = Field(5, ge=1)
    """Stop the run after so many steps in a row with a non-finite loss or gradient."""

    @model_validator(mode="after")
    def offload_is_of_what_is_sharded(self) -> LearnerConfig:
        """DeepSpeed would leave the rest on the GPU and say nothing."""
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"learner.offload = {self.offload!r} has nothing to move under learner.zero_stage = 0: use stage 1, 2 or 3")
        if self.offload_weights and (self.offload == "none" or self.zero_stage < 3):
            raise ValueError(
                "learner.offload_weights goes with learner.zero_stage = 3 and learner.offload = 'cpu' or 'nvme' (they are "
                f"{self.zero_stage} and {self.offload!r})"
            )
        if self.offload == "nvme" and self.zero_stage < 3:
            raise ValueError(f"learner.offload = 'nvme' needs learner.zero_stage = 3, not {self.zero_stage}")
        if (self.offload == "nvme") != (self.nvme_path is not None):
            raise ValueError("learner.nvme_path and learner.offload = 'nvme' go together: give both or neither")
        return self

    @model_validator(mode="after")
    def only_ray_is_told_here(self) -> LearnerConfig:
        """A number that nothing reads would be ignored."""
        if self.launcher == "none" and self.num_ranks > 1:
            raise ValueError(
                f"learner.num_ranks = {self.num_ranks} is for learner.launcher = 'ray'; torchrun and deepspeed take the number on "
                "their own command line: leave it out"
            )
        return self


class AlgorithmConfig(_Table):
    """`[algorithm]`: advantage, policy loss, engine correction."""

    advantage: AdvantageKind = "grpo"
    """How much better a response was than the others: within its group, standardized (`grpo`), centred (`dr_grpo`), against the mean of
    the others (`rloo`); or standardized over the batch (`reinforce_pp`, and `reinforce_pp_baseline` with the group's mean)."""
    loss: PolicyLoss = "ppo_clip"
    """Policy loss: clipped per token (`ppo_clip`) or per response (`gspo`), with a cut weight (`cispo`), or with a mask on the shift
    of probability against the engine (`dppo`)."""
    normalization: Normalization = "token"
    """Mean over the tokens of a step (`token`), over responses of their means (`sequence`; as GSPO was published), or over responses of
    the sum by `loop.max_response_tokens` (`dr`). The constraint's cost is a mean over tokens always."""
    clip_low: float | None = Field(None, gt=0, le=1)
    """How far the loss lets a token fall; unset: the published range of the loss (`ppo_clip`: 0.2)."""
    clip_high: float | None = Field(None, gt=0)
    """How far the loss lets a token rise; unset: the published range of the loss (`ppo_clip`: 0.28)."""
    correction: Correction = "none"
    """Engine correction: importance weights of p_learner / p_engine, truncated (`tis`) or dropped where they leave the bounds (`mis`,
    `icepop`), per token, per response (`_sequence`) or by the geometric mean of a response. All of them aim at the bf16 weights: use them
    when those ship."""
    correction_low: float | None = Field(None, ge=0)
    """Lower bound of the ratio; unset: the published one of the correction."""
    correction_high: float | None = Field(None, gt=0)
    """Upper bound, or cap, of the ratio; unset: the published one of the correction."""
    score_centering: bool = False
    """Take the drift towards the engine out of the gradient, with the fake-quantized twin as the engine's distribution; one more
    forward pass without gradient. Exact where the rollouts are of the weights of now; with several updates per rollout some drift is
    left."""
    routing_replay: bool = False
    """Mixtures of experts: the learner sends each token to the experts that it went to in the engine, weighed by its own router (R3). The
    gap is then measured along these routes."""

    @model_validator(mode="after")
    def bounds_are_in_order(self) -> AlgorithmConfig:
        """No ratio lies between bounds that cross."""
        low, high = self.correction_bounds
        if low > high:
            raise ValueError(f"algorithm.correction_low = {low:g} is above algorithm.correction_high = {high:g}")
        return self

    @model_validator(mode="after")
    def dppo_is_its_own_correction(self) -> AlgorithmConfig:
        """Its ratio against the engine is the importance weight already."""
        if self.loss == "dppo" and self.correction != "none":
            raise ValueError(
                f"algorithm.loss = 'dppo' weighs each token by p_learner / p_engine itself; algorithm.correction = {self.correction!r} "
                "would do so twice. Leave it at 'none'"
            )
        return self

    @model_validator(mode="after")
    def centering_fits_loss_and_correction(self) -> AlgorithmConfig:
        """The drift is a sum over the vocabulary: weights that exist for sampled tokens or whole responses alone have none."""
        if not self.score_centering:
            return self
        if self.loss != "ppo_clip":
            raise ValueError(f"algorithm.score_centering is derived for algorithm.loss = 'ppo_clip', not for {self.loss!r}")
        if self.correction not in CENTERED:
            raise ValueError(
                f"algorithm.score_centering goes with algorithm.correction = {', '.join(map(repr, CENTERED))}, not with "
                f"{self.correction!r}, whose weight belongs to a whole response"
            )
        return self

    @property
    def clip(self) -> ClipRange:
        """Range of the loss, with its own where none is given."""
        low, high = DEFAULT_CLIPS[self.loss]
        return ClipRange(low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high)

    @property
    def centering(self) -> tuple[Centered, Bounds] | None:
        """Weights of score centering with their bounds; None where it is off."""
        return (cast("Centered", self.correction), self.correction_bounds) if self.score_centering else None

    @property
    def correction_bounds(self) -> Bounds:
        """Bounds of the ratio, with the correction's own where none are given."""
        low, high = DEFAULT_BOUNDS[self.correction]
        return Bounds(
            low if self.correction_low is None else self.correction_low, high if self.correction_high is None else self.correction_high
        )


class ConstraintConfig(_Table):
    """`[constraint]`: the bound on the discrepancy and how it is enforced."""

    signal: Signal = "grey_box"
    """How the penalty reaches the gradient (docs/algorithm.md); `off` only measures."""
    grey_box_form: GreyBoxForm = "kl"
    """Of `grey_box` and `flatness`. `kl`: over the whole vocabulary; `top`: over the twin's 16 most probable tokens and the rest;
    `sampled`: abs(dp) of the sampled token."""
    grey_box_share: float = Field(1.0, gt=0, le=1)
    """Share of the prompts on which `grey_box` or `flatness` is computed at each update, in turns; its cost is scaled up to the batch.
    The twin's forward and backward pass costs in proportion."""
    advantage_form: AdvantageForm = "token"
    """Of `advantage`: the cost of each token or its mean over the response, and less its mean over the prompt's group or not."""
    measure: Measure = "abs_dp"
    """What the gap is measured in: `abs_dp` is abs(p_learner - p_engine), the others are of the log ratio (docs/algorithm.md)."""
    aggregation: Aggregation = "token"
    """Mean over all tokens, or over the responses of their means."""
    tolerance: float = Field(1.0, gt=0)
    """Bound on the mean gap, in `tolerance_unit`."""
    tolerance_unit: Literal["floor", "absolute"] = "floor"
    """`floor`: multiples of the gap measured at the start with the same weights on both sides."""
    tolerance_min: float | None = Field(None, ge=0)
    """Least tolerance where `tolerance_unit` is `floor`, as mean gap; unset: 0.004 for `abs_dp`, about what two computations in bf16
    differ by, else 0. A target whose weights cost less (8 and more bits, GPTQ) has a floor of rounding noise, which other CPUs exceed and
    no penalty lowers."""
    floor_tokens: int = Field(4096, ge=64)
    """Response tokens the floor is measured on."""
    floor_every: int = Field(0, ge=0)
    """Measure the floor anew, with the weights of now, after every so many steps; 0: at the start alone. The gap of the same weights is
    what the constraint bounds, so that a tolerance in floors then bounds how much it grows between two measurements, and no more."""
    controller: Literal["dual", "pid", "fixed"] = "dual"
    """`dual`: projected dual ascent; `pid`: with terms for the violation and for its rise; `fixed`: lambda stays at `lambda_init`."""
    kp: float = Field(1.0, ge=0)
    """`pid`: gain of the relative violation."""
    kd: float = Field(0.0, ge=0)
    """`pid`: gain of the gap's rise in a step, in tolerances."""
    reward_window: int = Field(0, ge=0)
    """Give the constraint up, and halve lambda, where it rose over so many steps and the mean reward fell by 0.05; 0: never."""
    lambda_init: float | None = Field(None, ge=0)
    """Multiplier at the first step; unset: 1, or `lambda_max` where that is less."""
    lambda_min: float = Field(0.0, ge=0)
    """Multiplier that stays while the gap is inside the tolerance."""
    lambda_max: float | None = Field(None, gt=0)
    """Projection bound; unset: 4.0 for `grey_box` and `flatness`, 0.3 for the signals that hold the engine constant and can destroy a
    run."""
    eta: float = Field(0.1, gt=0)
    """Step of the dual ascent per unit of relative violation."""
    ema: float = Field(0.9, ge=0, lt=1)
    """Decay of the average of the gap that the controller sees."""
    patience: int = Field(40, ge=1)
    """Steps in violation without a falling gap, lambda at its bound or rising, before the constraint is reported as infeasible and
    lambda is bounded."""

    @model_validator(mode="after")
    def lambda_starts_within_its_bound(self) -> ConstraintConfig:
        """A multiplier above its projection bound would be clipped at once."""
        if self.signal != "off" and self.lambda_init is not None and self.lambda_init > self.multiplier_cap:
            of_signal = f", the bound of signal {self.signal!r}: give constraint.lambda_max too" if self.lambda_max is None else ""
            raise ValueError(
                f"constraint.lambda_init = {self.lambda_init:g} is above constraint.lambda_max = {self.multiplier_cap:g}{of_signal}"
            )
        if self.signal != "off" and self.lambda_min > self.multiplier_cap:
            raise ValueError(
                f"constraint.lambda_min = {self.lambda_min:g} is above constraint.lambda_max = {self.multiplier_cap:g}: give both, in order"
            )
        return self

    @model_validator(mode="after")
    def multiples_are_of_something(self) -> ConstraintConfig:
        """The mean of k1 has either sign."""
        if self.measure == "k1" and self.tolerance_unit == "floor":
            raise ValueError(
                "constraint.measure = 'k1' has a mean of either sign, so that multiples of its floor bound nothing: use measure = 'k3', "
                "which estimates the same KL, or tolerance_unit = 'absolute'"
            )
        return self

    @property
    def is_probability(self) -> bool:
        """Whether the gap is the mean abs(dp) over tokens, which artifacts are verified by."""
        return self.measure == "abs_dp" and self.aggregation == "token"

    @property
    def least_tolerance(self) -> float:
        """`tolerance_min`, or the default of the measure."""
        if self.tolerance_min is not None:
            return self.tolerance_min
        return BF16_GAP if self.measure == "abs_dp" else 0.0

    @property
    def first_multiplier(self) -> float:
        """Lambda at the first step."""
        if self.signal == "off":
            return 0.0
        return min(1.0, self.multiplier_cap) if self.lambda_init is None else self.lambda_init

    @property
    def multiplier_cap(self) -> float:
        """`lambda_max`, or the default of the signal."""
        if self.lambda_max is not None:
            return self.lambda_max
        return 4.0 if self.signal in PAIRED else 0.3


class LoopConfig(_Table):
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


class CheckpointConfig(_Table):
    """`[checkpoint]`: what a kill may cost."""

    every_steps: int = Field(50, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the one of the highest deployed accuracy too, among those of steps that were evaluated (`export --checkpoint best`)."""


class EvaluationConfig(_Table):
    """`[evaluation]`: accuracy on held-out problems, greedy, on the engine and on the learner."""

    every_steps: int = Field(20, ge=1)
    """Steps between evaluations; the first comes before any update, one more after the last."""
    num_problems: int = Field(500, ge=1)
    """Held-out problems of an evaluation while training."""
    num_final_problems: int = Field(1000, ge=1)
    """Held-out problems of the first and the last evaluation, and of the task sample in the artifact."""


class EngineEntry(_Table):
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
        given = [name for name in ("server", "token_file", "ca_file", "folder", "folder_there") if name in self.model_fields_set]
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


class PoolConfig(_Table):
    """`[pool]`: how the `[[engines]]` work together."""

    min_engines: int = Field(1, ge=1)
    """With fewer that serve, the run saves a checkpoint and stops."""
    deadline_s: float = Field(3600.0, gt=0)
    """An engine that takes longer for an answer counts as hung: it is taken out."""
    restart_after_s: float = Field(5.0, ge=0)
    """Pause before an engine that was taken out is started anew, doubled with each failure in a row."""
    requests_per_engine: int = Field(4, ge=1)
    """Requests that a batch of rollouts is cut into, for each engine: more even out their speeds, fewer make larger batches."""


class RayConfig(_Table):
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


class RunConfig(_Table):
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


def load_config(
    files: Sequence[Path], settings: Sequence[str] = (), target: str | None = None, base: RunConfig | None = None
) -> tuple[RunConfig, TargetProfile]:
    """Merge the recipe, the profile's recommended `[constraint]`, TOML `files` and `settings` (`a.b=c`); later ones win.

    Args:
        files: TOML files; none gives the defaults, which are the demo.
        settings: `table.key=value`; the value is read as TOML, and as a plain string where it is not TOML.
        target: What --target said; wins over `[target] name`.
        base: A config that everything else is laid over (a resumed run's own); None is the defaults.

    Raises:
        UsageError: a file that is missing or unreadable, or a setting without `=`.
        ProfileError: every unknown key and every value of a wrong type or range, at once.
        UnknownNameError: the target does not exist.
    """
    merged: dict[str, Any] = {} if base is None else base.model_dump(mode="json")
    for file in files:
        _merge(merged, _read_toml(file))
    for setting in settings:
        _merge(merged, _parse_setting(setting))
    if target is not None:
        _merge(merged, {"target": {"name": target}})
    name = _dig(merged, "target", "name", default=TargetConfig().name)
    profile = load_profile(name if isinstance(name, str) else str(name))
    with_profile = recipe_settings(merged.get("recipe", "auto"), profile, merged)
    _merge(with_profile, {"constraint": dict(profile.constraint)})
    _merge(with_profile, merged)
    try:
        return RunConfig.model_validate(with_profile), profile
    except ValidationError as error:
        source = ", ".join(str(file) for file in files) or "the settings"
        raise ProfileError(f"the config ({source}) is not valid", validation_lines(error), _known_keys_hint(error)) from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"config file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {file} is not valid TOML: {error}") from None


def _parse_setting(setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {setting!r} is not of the form table.key=value, e.g. --set loop.num_steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    nested: Any = value
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(into: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            # A table with another `type` is another table: keys of the old type would be unknown to it.
            if "type" in value and value["type"] != into[key].get("type"):
                into[key] = dict(value)
            else:
                _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _dig(tree: Mapping[str, Any], *keys: str, default: Any) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _known_keys_hint(error: ValidationError) -> str:
    """The keys there are, for the first table that was given an unknown one."""
    tables: dict[str, type[BaseModel]] = {"arithmetic": ArithmeticConfig, "dataset": DatasetConfig}
    tables |= {name: field.annotation for name, field in RunConfig.model_fields.items() if isinstance(field.annotation, type)}
    for item in error.errors():
        if item["type"] == "extra_forbidden":
            table = str(item["loc"][-2]) if len(item["loc"]) > 1 else ""
            known = tables[table].model_fields if table in tables else RunConfig.model_fields
            return f"Known keys of {table or 'the top level'}: {', '.join(known)}"
    return ""
