"""What has to be computed for which responses of a batch: a gradient, the twin beside it, or a measurement alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetero_rl.algorithm.kinds import PAIRED, GreyBoxForm
from hetero_rl.config import ConstraintConfig
from hetero_rl.types import TrainSequence


@dataclass(frozen=True, slots=True)
class Part:
    """Responses that are treated alike. `cost_scale`: by what their cost counts, so that its sum stands for the whole batch."""

    sequences: Sequence[TrainSequence]
    with_gradient: bool
    grey_box: GreyBoxForm | None = None
    cost_scale: float = 1.0


def split_batch(sequences: Sequence[TrainSequence], constraint: ConstraintConfig, multiplier: float, num_updates: int) -> list[Part]:
    """The parts of a batch, none of them empty.

    A response teaches when its advantage is not 0, or when a constraint is at work on it; the others are only measured. Of the grey
    box's `grey_box_share`, whole prompts take turns from update to update (`num_updates` of them were done). All responses
    teach when none would: DeepSpeed takes no step without a backward pass.
    """
    at_work = constraint.signal != "off" and multiplier > 0.0
    form = constraint.grey_box_form if constraint.signal in PAIRED and at_work else None
    share = constraint.grey_box_share if form is not None else 0.0
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(sequence.prompt for sequence in sequences))}
    paired, teaching, silent = [], [], []
    for sequence in sequences:
        if (place[sequence.prompt] + num_updates) * share % 1.0 < share:
            paired.append(sequence)
        elif sequence.advantage != 0.0 or (at_work and form is None):
            teaching.append(sequence)
        else:
            silent.append(sequence)
    if not paired and not teaching:
        teaching, silent = silent, []
    # Not by how many there are in this batch: updates whose turn brings none would then be missing from the mean.
    parts = [Part(paired, True, form, 1.0 / share if share else 1.0), Part(teaching, True), Part(silent, False)]
    return [part for part in parts if part.sequences]
