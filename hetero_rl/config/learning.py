"""`[learner]`, `[algorithm]`, `[constraint]`: how the weights learn, and what holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from pydantic import Field, model_validator

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
from hetero_rl.config.table import Table

BF16_GAP = 0.004
"""Mean abs(dp) that two computations in bf16 differ by, about."""


NVME_IS_NOT_RESTORED = (
    "what DeepSpeed 0.19 saves of weights and optimizer that lie on a disk does not come back when it is loaded, and the run would begin "
    "again with its first weights. Use learner.offload = 'cpu' where a run must survive"
)


class LearnerConfig(Table):
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
    """Folder on a fast local disk, for `offload = "nvme"`; needs libaio. Such a run cannot be resumed: DeepSpeed does not restore it."""
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

    def in_one_process(self) -> LearnerConfig:
        """For what needs the weights alone."""
        alone = {"zero_stage": 0, "offload": "none", "offload_weights": False, "nvme_path": None, "launcher": "none", "num_ranks": 1}
        return self.model_copy(update=alone)

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


class AlgorithmConfig(Table):
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


class ConstraintConfig(Table):
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
