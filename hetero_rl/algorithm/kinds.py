"""The names under which a config chooses among the pieces of the method; no torch, so that any command can read a config."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Correction = Literal["none", "tis", "tis_sequence", "mis", "mis_sequence", "mis_geometric", "icepop"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)
Centered = Literal["none", "tis", "mis", "icepop"]
CENTERED: tuple[Centered, ...] = get_args(Centered)


class Bounds(NamedTuple):
    """[low, high] of an importance ratio, 0 <= low <= high; truncation (TIS) uses `high` alone."""

    low: float
    high: float


DEFAULT_BOUNDS: dict[Correction, Bounds] = {
    "none": Bounds(0.0, float("inf")),
    "tis": Bounds(0.0, 2.0),
    "tis_sequence": Bounds(0.0, 2.0),
    "mis": Bounds(0.5, 2.0),
    "mis_sequence": Bounds(0.5, 2.0),
    "mis_geometric": Bounds(1 / 1.001, 1.001),
    "icepop": Bounds(0.5, 5.0),
}
"""Of `corrections.correction_weights`. Published starting points, for engines of 8 and more bits. `mis_geometric` is a mean per token:
the bounds of a product would let everything through, and on a coarse grid, where that mean lies some percent below 1, these drop
everything."""

AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
ADVANTAGES: tuple[AdvantageKind, ...] = get_args(AdvantageKind)
PolicyLoss = Literal["ppo_clip", "gspo", "cispo", "dppo"]
POLICY_LOSSES: tuple[PolicyLoss, ...] = get_args(PolicyLoss)
Normalization = Literal["token", "sequence", "dr"]


class ClipRange(NamedTuple):
    """How far below and above its anchor a policy loss lets a token move; in the unit of the loss, see `losses`."""

    low: float
    high: float


DEFAULT_CLIPS: dict[PolicyLoss, ClipRange] = {
    "ppo_clip": ClipRange(0.2, 0.28),
    "gspo": ClipRange(3e-4, 4e-4),
    "cispo": ClipRange(1.0, 4.0),
    "dppo": ClipRange(0.15, 0.15),
}
"""Published starting points: DAPO's, GSPO's, a CISPO without a lower bound, and DPPO's threshold of the total variation."""

Signal = Literal["off", "grey_box", "flatness", "loss", "advantage"]
PAIRED: tuple[Signal, ...] = ("grey_box", "flatness")
"""Signals that run the learner's twin beside it."""
GreyBoxForm = Literal["kl", "top", "sampled"]
"""Of `signals.grey_box_cost`."""
AdvantageForm = Literal["token", "response", "token_centered", "response_centered"]
"""Of `signals.advantage_side`."""
Measure = Literal["abs_dp", "abs_log_ratio", "k1", "k2", "k3", "chi2"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""Of `discrepancy.discrepancy`."""
Aggregation = Literal["token", "response"]
"""`token`: the mean over all tokens; `response`: over responses of their means, so that short ones count as much as long ones."""
