"""Checkpoints: a folder that is either whole or not there, and all that a resume needs to go on as if nothing had happened.

    checkpoints/step-000050/state.json     step, multiplier, floor, probes of the proof, calibration, length of metrics.jsonl
    checkpoints/step-000050/learner/       DeepSpeed's own files: master weights, optimizer, scheduler

Nothing random needs to be stored: problems and sampling follow from (seed, step). DeepSpeed's files are pickles; they are
read from your own run folder only, so treat a run folder from elsewhere as you would treat a program from elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy_targets.types import TokenSequence
from hetero_rl.algorithm.constraint import DualState
from hetero_rl.algorithm.tolerance import Floor
from hetero_rl.errors import RunFolderError
from hetero_rl.learner.deepspeed_learner import Learner

STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True)
class LoopState:
    """What the loop carries from step to step, besides the learner."""

    step: int
    """Steps completed."""
    weight_version: int
    """Version that the engine serves."""
    dual: DualState
    """The multiplier and what drives it."""
    floor: Floor
    """Measured once, before the first update."""
    tolerance: float
    """The bound on the engine gap, in the measure of the constraint."""
    served_floor: float
    """Mean abs(dp) over the tokens that the floor was measured on: what an artifact's own gap is held against."""
    served_tolerance: float
    """The bound on it."""
    probes: tuple[TokenSequence, ...]
    """Sequences that every publish is proven on."""
    reference_gap: float
    """Mean abs(dp) of the kernels alone, measured on the fresh engine."""
    calibration: tuple[TokenSequence, ...] = ()
    """Rollouts that the served weights are rounded by; none where the quantizer is not calibrated."""
    num_rebuilds: int = 0
    """Engines that had to be rebuilt after a failed proof."""
    compute_dtype: str = "bfloat16"
    """The learner's arithmetic: the floor was measured in it, so a resumed run keeps it."""
    start_accuracy: float | None = None
    """Deployed accuracy before any update."""
    metrics_offset: int = 0
    """Bytes of metrics.jsonl that belong to the completed steps."""


def save_checkpoint(folder: Path, state: LoopState, learner: Learner, keep: int) -> Path:
    """Write a checkpoint under a temporary name, flush it, rename it, and only then delete the oldest beyond `keep`."""
    final = folder / f"step-{state.step:06d}"
    temporary = folder / f"{final.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    learner.save(temporary)
    (temporary / STATE_FILE).write_text(json.dumps(asdict(state)), "utf-8")
    for file in [path for path in temporary.rglob("*") if path.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial" and (path / STATE_FILE).is_file())


def load_state(checkpoint: Path) -> LoopState:
    """The loop's part of a checkpoint. Raises `RunFolderError` for one that does not parse."""
    try:
        raw = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
        raw["dual"] = DualState(**raw["dual"])
        raw["floor"] = Floor(**raw["floor"])
        for key in ("probes", "calibration"):
            raw[key] = tuple(TokenSequence(tuple(sequence["tokens"]), sequence["prompt_len"]) for sequence in raw.get(key, ()))
        return LoopState(**raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"checkpoint {checkpoint} is damaged ({error}); delete it to resume from the one before") from None
