"""What is compared: an arm (a recipe) in a regime, on a task, for a target, under a seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from deploy_targets.profile import load_profile
from hetero_rl.recipe import RECIPES, RecipeName, choose

TARGETS = Path(__file__).parent / "targets"
"""Profiles of targets that are compared and not shipped."""
FULL_PRECISION = "fp32-onnx"
"""Rollouts by this engine differ from the learner by rounding noise alone (a gap below 1e-5). On a GPU: `--reference bf16-vllm`."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A recipe as settings of `hetero-rl train`."""

    what: str
    settings: tuple[str, ...] = ()
    full_precision_rollouts: bool = False
    """Rollouts by the full-precision engine; what is deployed is the target's copy of what was learned."""
    deployed_as_trained: bool = False
    """Judged by the full-precision engine as well: no mismatch at all."""
    ours: bool = False
    """A recipe of this project, to be held against the rivals."""
    drawn: bool = False
    """Whether it has a curve; more than six cannot be told apart."""
    tolerance: float | None = None
    """Bound of the constraint in floors, of the arms that differ in it alone."""

    @property
    def measures_the_rest(self) -> bool:
        """Whether the learner computes with the rounded weights: its gap is what is left beside them, and so is its floor."""
        return "learner.forward=fake_quant" in self.settings


PAPER = ("constraint.lambda_init=0.1", "constraint.lambda_max=5", "constraint.ema=0", "constraint.patience=100000")
"""The published constants, without this project's average of the gap and its watch for a bound that cannot be met."""
FLOORS = {"q2_k-llamacpp": 0.048, "int4-onnx": 0.0105}
"""Measured; the published eta of 1 per unit of the gap is one floor per unit of relative violation."""
OFF = ("constraint.signal=off",)


def shipped(name: RecipeName) -> tuple[str, ...]:
    """The settings of a recipe of `hetero_rl/recipe.py`."""
    return tuple(f"{table}.{key}={value}" for table, values in RECIPES[name].settings.items() for key, value in values.items())


def corrected(*settings: str) -> tuple[str, ...]:
    """Without a constraint, with `[algorithm]` settings."""
    return (*OFF, *(f"algorithm.{setting}" for setting in settings))


def held(multiplier: float, *settings: str) -> tuple[str, ...]:
    """A constant lambda."""
    return ("constraint.controller=fixed", f"constraint.lambda_init={multiplier}", *settings)


def bounded(tolerance: float) -> Arm:
    """`grey_dual` with another bound."""
    return Arm(f"grey box, dual ascent to {tolerance:g} x floor", (f"constraint.tolerance={tolerance}",), ours=True, tolerance=tolerance)


ARMS = {
    "control": Arm("no mismatch: full precision on both sides", OFF, full_precision_rollouts=True, deployed_as_trained=True, drawn=True),
    "ptq": Arm("full-precision rollouts, quantized once at the end", OFF, full_precision_rollouts=True),
    "grpo": Arm("rollouts by the target, nothing else", OFF, drawn=True),
    "tis": Arm("token-level truncated importance sampling, cap 2", corrected("correction=tis"), drawn=True),
    "mis_sequence": Arm("masked importance sampling of whole responses", corrected("correction=mis_sequence")),
    "icepop": Arm("IcePop: tokens masked outside [0.5, 5]", corrected("correction=icepop")),
    "dppo": Arm("DPPO: mask on abs(dp) against the engine", corrected("loss=dppo")),
    "centering": Arm("score centering with the twin as the engine", corrected("score_centering=true")),
    "fake_quant": Arm("the learner computes with the rounded weights", (*OFF, "learner.forward=fake_quant"), drawn=True),
    "paper_loss": Arm("the paper's loss side, 1 x floor, lambda from 0.1", ("constraint.signal=loss", *PAPER), drawn=True),
    "paper_loss_1.5x": Arm("the same at 1.5 x floor", ("constraint.signal=loss", "constraint.tolerance=1.5", *PAPER)),
    "paper_advantage": Arm("the paper's advantage side, 1 x floor, lambda from 0.1", ("constraint.signal=advantage", *PAPER)),
    "grey": Arm("grey box, lambda 0.3", held(0.3), ours=True),
    "grey_1": Arm("grey box, lambda 1", held(1.0), ours=True),
    "recipe": Arm("the shipped recipe `grey_box`", shipped("grey_box"), ours=True, drawn=True),
    "guard": Arm("the shipped recipe `guard`", shipped("guard"), ours=True),
    "grey_dual": Arm("grey box, dual ascent to 1 x floor", ours=True, tolerance=1.0),
    "grey_top": Arm("grey box over the top 16 tokens, lambda 0.3", held(0.3, "constraint.grey_box_form=top"), ours=True),
    "grey_sampled": Arm("grey box of the sampled token, lambda 0.3", held(0.3, "constraint.grey_box_form=sampled"), ours=True),
    "grey_share": Arm("grey box on a third of the prompts, lambda 0.3", held(0.3, "constraint.grey_box_share=0.34"), ours=True),
    "flatness": Arm("rounding errors at random signs, lambda 0.3", held(0.3, "constraint.signal=flatness"), ours=True),
    "fake_quant_grey": Arm("both: rounded weights, and grey box with lambda 0.3", held(0.3, "learner.forward=fake_quant"), ours=True),
    "fake_quant_recipe": Arm("the shipped recipe `rounded`: both, rounded weights and `grey_box`", shipped("rounded"), ours=True),
    **{f"grey_{bound:g}x": bounded(bound) for bound in (0.5, 0.7, 1.5, 2.0)},
}  # fmt: skip
SWEEP = tuple(sorted((name for name, arm in ARMS.items() if arm.tolerance), key=lambda name: ARMS[name].tolerance or 0.0))
"""Arms by rising tolerance; `grpo` is the one without a bound."""


def served_by(target: str) -> str:
    """What --target takes for `target`: its name, or the profile of this folder."""
    own = TARGETS / f"{target}.toml"
    return str(own) if own.is_file() else target


def default_arm(target: str) -> str:
    """The arm that has the settings of the recipe which `auto` picks for `target`."""
    recipe, _ = choose(load_profile(served_by(target)))
    return next(name for name, arm in ARMS.items() if arm.settings == shipped(recipe) and not arm.full_precision_rollouts)


REGIMES = {
    "on_policy": (),
    "stale": ("learner.updates_per_rollout=4",),
    "high_lr": ("learner.lr=4e-4",),
    "one_step_off": ("loop.schedule=one_step_off",),
}


@dataclass(frozen=True, slots=True)
class TaskSetup:
    """A task, the model that begins it, and how long it is trained."""

    size: str | None
    """Of the warm start (`warm_start.SIZES`); None: the shipped demo model."""
    settings: tuple[str, ...]


EXPRESSION = ("task.reward=benchmarks.evidence.tasks:last_step", "loop.max_response_tokens=40", "learner.lr=1e-4")
FEWER = ("loop.num_steps=120", "loop.prompts_per_step=16")
"""For models and responses that two cores would take hours over."""
TASKS = {
    "addition": TaskSetup(None, ("task.digits=3", "loop.max_response_tokens=8", "learner.lr=1e-4")),
    "expression": TaskSetup("3M", (*EXPRESSION, *FEWER)),
    "sorting": TaskSetup("3M", ("task.reward=exact", "loop.max_response_tokens=28", "learner.lr=1e-4", *FEWER)),
    "expression_10M": TaskSetup("10M", (*EXPRESSION, *FEWER)),
    "expression_100M": TaskSetup("100M", EXPRESSION),
}
COMMON = (
    "recipe=none", "loop.num_steps=160", "loop.prompts_per_step=32", "loop.samples_per_prompt=8", "learner.warmup_steps=10",
    "evaluation.every_steps=40", "evaluation.num_problems=500", "evaluation.num_final_problems=1000", "checkpoint.every_steps=160",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    task: str
    target: str
    regime: str
    arm: str
    seed: int
    reference: str = FULL_PRECISION

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.task}/{self.target}/{self.regime}/{self.arm}/{self.seed}"

    @property
    def served_by(self) -> str:
        """What --target takes for `target`."""
        return served_by(self.target)

    @property
    def rollout_target(self) -> str:
        """The engine that makes the rollouts."""
        return self.reference if ARMS[self.arm].full_precision_rollouts else self.served_by

    @property
    def settings(self) -> tuple[str, ...]:
        """`--set` of the run; later ones win."""
        arm = ARMS[self.arm].settings
        eta = (f"constraint.eta={FLOORS.get(self.target, 0.04)}",) if set(PAPER) <= set(arm) else ()
        return (*COMMON, *TASKS[self.task].settings, *REGIMES[self.regime], *arm, *eta, f"loop.seed={self.seed}")


@dataclass(frozen=True, slots=True)
class Block:
    """Every combination of these."""

    tasks: Sequence[str]
    targets: Sequence[str]
    regimes: Sequence[str]
    arms: Sequence[str]
    seeds: Sequence[int]


FINALISTS = ("control", "ptq", "grpo", "tis", "fake_quant", "recipe")
FEW = ("control", "ptq", "grpo", "fake_quant", "recipe")
FIVE = (0, 1, 2, 3, 4)
ALL = tuple(name for name in ARMS if name not in SWEEP or name == "grey_dual")
SUITES: dict[str, tuple[Block, ...]] = {
    "screening": (
        Block(("addition",), ("q2_k-llamacpp",), ("on_policy",), ALL, (0, 1)),
        Block(("addition",), ("q2_k-llamacpp",), ("high_lr",), FEW, (0, 1)),
        Block(("addition",), ("int4-vllm-channel", "fp8-vllm-fp8kv"), ("on_policy",), ("control", "ptq", "grpo", "tis", "recipe"), (0, 1)),
    ),
    "tolerance": (Block(("addition",), ("q2_k-llamacpp",), ("on_policy",), (*SWEEP, "grpo"), (0, 1)),),
    "finalists": (
        Block(("addition",), ("q2_k-llamacpp",), ("on_policy", "stale"), (*FINALISTS, "fake_quant_recipe"), FIVE),
        Block(("expression",), ("q2_k-llamacpp",), ("on_policy",), (*FINALISTS, "fake_quant_recipe"), FIVE),
        Block(("addition",), ("int4-onnx",), ("on_policy",), (*FINALISTS, "guard"), FIVE),
        Block(("sorting",), ("q2_k-llamacpp",), ("on_policy",), (*FEW, "fake_quant_recipe"), FIVE),
        Block(("addition",), ("q2_k-llamacpp",), ("one_step_off",), ("recipe",), FIVE),
    ),
    "defaults": (
        Block(("addition",), ("fp8-vllm-fp8kv",), ("on_policy",), ("control", "ptq", "grpo", "tis", "recipe"), FIVE),
        Block(("addition",), ("int4-vllm-channel",), ("on_policy",), ("control", "ptq", "grpo", "tis", "guard"), FIVE),
        Block(("addition",), ("q2_k-llamacpp",), ("high_lr",), ("fake_quant_recipe",), (0, 1)),
    ),
    "larger": (Block(("expression_10M",), ("q2_k-llamacpp",), ("on_policy",), (*FEW, "fake_quant_recipe"), (0, 1)),),
    "gpu": (Block(("expression_100M",), ("int4-vllm", "int4-vllm-channel", "fp8-vllm-fp8kv"), ("on_policy", "stale"), FINALISTS, FIVE),),
}
"""Sized for two cores, but for `larger` and `gpu`: screening has two seeds, finalists five; a run takes two to ten minutes of a core.
`defaults` are the cells in which what `auto` ships had too few seeds to be judged."""


def cells(blocks: Iterable[Block], reference: str = FULL_PRECISION, **only: Sequence[Any]) -> Iterator[Cell]:
    """The cells of `blocks`, those alone whose fields (`task`, `target`, ...) are in `only`.

    Seed by seed within a block, so that an early stop leaves whole comparisons.
    """
    seen = set()
    for block in blocks:
        for seed, task, target, regime, arm in product(block.seeds, block.tasks, block.targets, block.regimes, block.arms):
            cell = Cell(task, target, regime, arm, seed, reference)
            if cell not in seen and all(getattr(cell, field) in values for field, values in only.items()):
                seen.add(cell)
                yield cell
