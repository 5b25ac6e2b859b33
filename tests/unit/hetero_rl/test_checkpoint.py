"""Checkpoints: whole or not there, read back, kept and chosen."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hetero_rl.algorithm.constraint import DualState
from hetero_rl.algorithm.tolerance import Floor
from hetero_rl.checkpoint import LoopState, checkpoints, chosen_checkpoint, load_state, newest_whole, recovered, save_checkpoint
from hetero_rl.config import CheckpointConfig
from hetero_rl.errors import RunFolderError

START = LoopState(0, 0, DualState(1.0), Floor(0.01, 0.009, 0.011, 100), 0.01, 0.01, 0.01, (), 0.001)


class Writes:
    """The part of a learner that a checkpoint needs: it writes files."""

    def save(self, folder: Path) -> None:
        (folder / "learner").mkdir()
        (folder / "learner" / "states.pt").write_bytes(bytes(range(200)))


class FillsTheDisk(Writes):
    def save(self, folder: Path) -> None:
        super().save(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save(folder: Path, step: int, accuracy: float | None = None, learner: Any = None, **config: Any) -> Path:
    state = replace(START, step=step, deployed_accuracy=accuracy)
    return save_checkpoint(folder, state, learner or Writes(), CheckpointConfig(**config))


def test_what_is_kept(tmp_path: Path) -> None:
    for step, accuracy in enumerate([0.1, 0.7, None, 0.7, 0.2, 0.3, float("nan")]):
        save(tmp_path, step, accuracy, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000003", "step-000005", "step-000006"]
    assert load_state(chosen_checkpoint(tmp_path, "best", pytest.fail) or tmp_path).deployed_accuracy == 0.7
    save(tmp_path, 7, keep=1, keep_best=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_one_by_its_name(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    assert chosen_checkpoint(tmp_path, "10", pytest.fail) == tmp_path / "step-000010"
    assert chosen_checkpoint(tmp_path, "newest", pytest.fail) == tmp_path / "step-000020"
    for which, why in {
        "15": "no such one. There are: newest, steps 10, 20",
        "best": "none of them was evaluated",
        "last": "no such",
    }.items():
        with pytest.raises(RunFolderError, match=why):
            chosen_checkpoint(tmp_path, which, pytest.fail)


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("name", ["state.json", "files.json", "learner/states.pt"])
def test_a_truncated_one_is_left_aside(tmp_path: Path, name: str, tenth: int) -> None:
    older, newer, warnings = save(tmp_path, 1), save(tmp_path, 2), list[str]()
    os.truncate(newer / name, (newer / name).stat().st_size * tenth // 10)
    assert newest_whole(tmp_path, warnings.append) == older
    assert len(warnings) == 1
    assert "step-000002 is damaged" in warnings[0]
    with pytest.raises(RunFolderError, match="damaged"):
        chosen_checkpoint(tmp_path, "2", pytest.fail)
    (older / "learner" / "states.pt").write_bytes(b"other")
    with pytest.raises(RunFolderError, match="all 2 checkpoints"):
        newest_whole(tmp_path, warnings.append)


@pytest.mark.fault("checkpoint that lacks a file")
def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-000001" / "learner" / "states.pt").unlink()
    with pytest.raises(RunFolderError, match="all 1 checkpoints"):
        newest_whole(tmp_path, lambda warning: None)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for step in (1, 2):
        with pytest.raises(OSError, match=f"step {step} could not be written.*No space left"):
            save(tmp_path, step, 0.5, learner=FillsTheDisk())
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert newest_whole(tmp_path, pytest.fail) == tmp_path / "step-000001"


def test_the_same_state_is_not_written_twice(tmp_path: Path) -> None:
    """A signal in the step of a checkpoint: it is there already, and the grace period short."""
    first = save(tmp_path, 1, 0.5)
    assert save(tmp_path, 1, 0.5, learner=FillsTheDisk()) == first
    (first / "learner" / "states.pt").write_bytes(b"damaged")
    save(tmp_path, 1, 0.5)
    assert newest_whole(tmp_path, pytest.fail) == first


def test_a_kill_between_two_renames(tmp_path: Path) -> None:
    first = save(tmp_path, 1, 0.5)
    os.replace(first, first.with_suffix(".replaced"))
    assert newest_whole(tmp_path, pytest.fail) is None, "others than the run may look at it"
    assert newest_whole(recovered(tmp_path), pytest.fail) == first
    assert load_state(first).deployed_accuracy == 0.5
    (tmp_path / "step-000001.replaced").mkdir()
    assert [path.name for path in recovered(tmp_path).iterdir()] == ["step-000001"]


def test_the_same_step_again(tmp_path: Path) -> None:
    """A killed save may have left its folders; they are in nobody's way."""
    for left_over in ("step-000001.partial", "step-000001.replaced"):
        (tmp_path / left_over / "learner").mkdir(parents=True)
    save(tmp_path, 1)
    assert load_state(save(tmp_path, 1, 0.5)).deployed_accuracy == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
