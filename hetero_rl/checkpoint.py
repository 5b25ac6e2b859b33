"""Checkpoints: a folder that is either whole or not there, and all that a resume needs to go on as if nothing had happened.

    checkpoints/step-000050/state.json     step, multiplier, floor, probes of the proof, calibration, length of metrics.jsonl
    checkpoints/step-000050/learner/       DeepSpeed's own files: master weights, optimizer, scheduler
    checkpoints/step-000050/files.json     sha256 of all of them

Nothing random needs to be stored: problems and sampling follow from (seed, step). What was sampled ahead is, as its weights are
gone. DeepSpeed's files are pickles; they are read from your own run folder only, so treat a run folder from elsewhere as you would
treat a program from elsewhere.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy_targets.types import TokenSequence
from deploy_targets.weights_file import sha256_of
from hetero_rl.algorithm.constraint import DualState
from hetero_rl.algorithm.tolerance import Floor
from hetero_rl.config import CheckpointConfig
from hetero_rl.errors import RunFolderError
from hetero_rl.learner.deepspeed_learner import Learner

STATE_FILE = "state.json"
FILES_FILE = "files.json"
FULL_BYTES = 1 << 20


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
    """Measured before the first update, and anew where `constraint.floor_every` asks for it."""
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
    num_ranks: int = 1
    """Ranks that the learner's part is spread over, beyond ZeRO stage 0."""
    start_accuracy: float | None = None
    """Deployed accuracy before any update."""
    deployed_accuracy: float | None = None
    """The same after this very step, where it was evaluated."""
    row: dict[str, float] | None = None
    """Metrics of the last step, where its floor or evaluation failed and is still to be made."""
    ahead: dict[str, Any] | None = None
    """Rollouts of the next step that were made before the last one's weights were served (ahead.py)."""
    metrics_offset: int = 0
    """Bytes of metrics.jsonl that belong to the completed steps."""


def save_checkpoint(folder: Path, state: LoopState, learner: Learner, config: CheckpointConfig) -> Path:
    """Write a checkpoint under a temporary name, flush it, rename it, read it back, and only then delete what is no longer kept.

    One that is there already, with the same `state`, stays. Raises `OSError` where it cannot be written; what was there before is
    untouched then.
    """
    final = folder / name_of(state.step)
    temporary, replaced = (final.with_suffix(suffix) for suffix in (".partial", ".replaced"))
    if damage_of(final) is None and load_state(final) == state:
        return final
    for left_over in (temporary, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        learner.save(temporary)
        (temporary / STATE_FILE).write_text(json.dumps(asdict(state)), "utf-8")
        (temporary / FILES_FILE).write_text(json.dumps(_hashes(temporary), indent=1), "utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
    except Exception as error:
        # Where the disk is full, torch's writer speaks of unexpected positions.
        is_full = shutil.disk_usage(temporary).free < FULL_BYTES
        shutil.rmtree(temporary, ignore_errors=True)
        reason = os.strerror(errno.ENOSPC) if is_full else error
        raise OSError(f"the checkpoint of step {state.step} could not be written to {folder}: {reason}") from error
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    _flush(folder)
    if (damage := damage_of(final)) is not None:
        raise OSError(f"checkpoint {final} was written, but does not read back: {damage}. The one before is kept")
    shutil.rmtree(replaced, ignore_errors=True)
    for old in _no_longer_kept(folder, config):
        shutil.rmtree(old)
    return final


def name_of(step: int) -> str:
    """Folder of the checkpoint of a step."""
    return f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were finished, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix and (path / STATE_FILE).is_file())


def newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every byte is there, None where there is none yet; `warn` is told of damaged ones.

    Raises `RunFolderError` when all are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        warn(f"checkpoint {checkpoint} is damaged and left aside: {damage}")
    if found:
        raise RunFolderError(f"all {len(found)} checkpoints in {folder} are damaged; the run must be started anew, with another --run-dir")
    return None


def recovered(folder: Path) -> Path:
    """The folder, as a kill between two renames should have left it: what was to be replaced is there again. For the run alone to call."""
    for replaced in folder.glob("step-*.replaced"):
        if replaced.with_suffix("").exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, replaced.with_suffix(""))
    return folder


def chosen_checkpoint(folder: Path, which: str, warn: Callable[[str], None]) -> Path | None:
    """`newest`, `best` by deployed accuracy, or that of a step. Raises `RunFolderError` for one that is not there or damaged."""
    if which == "newest":
        return newest_whole(folder, warn)
    found = {load_state(checkpoint).step: checkpoint for checkpoint in checkpoints(folder)}
    chosen = best_checkpoint(folder) if which == "best" else found.get(int(which)) if which.isdecimal() else None
    if chosen is None:
        why = "none of them was evaluated" if which == "best" else "there is no such one"
        raise RunFolderError(f"checkpoint {which!r} of {folder}: {why}. There are: newest, steps {', '.join(map(str, found)) or 'none'}")
    if (damage := damage_of(chosen)) is not None:
        raise RunFolderError(f"checkpoint {chosen} is damaged: {damage}")
    return chosen


def best_checkpoint(folder: Path) -> Path | None:
    """The one of the highest deployed accuracy, the newest of equals; None where none was evaluated."""
    accuracies = {checkpoint: load_state(checkpoint).deployed_accuracy for checkpoint in checkpoints(folder)}
    evaluated = {checkpoint: accuracy for checkpoint, accuracy in accuracies.items() if accuracy is not None and math.isfinite(accuracy)}
    return max(evaluated, key=lambda checkpoint: (evaluated[checkpoint], checkpoint), default=None)


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, None where nothing is."""
    try:
        expected = json.loads((checkpoint / FILES_FILE).read_text("utf-8"))
        differing = [name for name, sha256 in expected.items() if sha256_of(checkpoint / name) != sha256]
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return f"{', '.join(differing)} changed since it was written" if differing else None


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


def _hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _flush(path: Path) -> None:
    """Get a file or the entries of a folder onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _no_longer_kept(folder: Path, config: CheckpointConfig) -> list[Path]:
    best = best_checkpoint(folder) if config.keep_best else None
    return [old for old in checkpoints(folder)[: -config.keep] if old != best]
