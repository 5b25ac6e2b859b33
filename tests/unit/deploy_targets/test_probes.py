"""Probes survive the file, and a file that holds none is an ArtifactError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deploy_targets.errors import ArtifactError
from deploy_targets.probes import Probe, ProbeSet, read_probes, write_probes
from deploy_targets.types import TokenSequence

METADATA = {"format": "probes-1", "temperature": "0.7", "weight_version": "5"}


def probe(tokens: tuple[int, ...], prompt_len: int) -> Probe:
    num_scored = len(tokens) - prompt_len
    logps = -np.linspace(0.1, 2.0, num_scored, dtype=np.float32)
    return Probe(TokenSequence(tokens, prompt_len), logps, np.arange(num_scored, dtype=np.int32) + tokens[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_probes(tmp_path / "p.safetensors", ProbeSet((probe((3, 4, 5), 1), probe((9, 8, 7, 6, 5), 4)), 0.7, 5))
    return tmp_path / "p.safetensors"


def test_round_trip(path: Path) -> None:
    read = read_probes(path)
    assert (read.temperature, read.weight_version) == (0.7, 5)
    assert [p.sequence for p in read.probes] == [TokenSequence((3, 4, 5), 1), TokenSequence((9, 8, 7, 6, 5), 4)]
    for found, written in zip(read.probes, (probe((3, 4, 5), 1), probe((9, 8, 7, 6, 5), 4)), strict=True):
        np.testing.assert_array_equal(found.learner_logps, written.learner_logps)
        np.testing.assert_array_equal(found.learner_greedy, written.learner_greedy)
        assert (found.learner_logps.dtype, found.learner_greedy.dtype) == (np.float32, np.int32)


def replace(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays.update({name: value})


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda arrays: arrays.pop("tokens"), "arrays are"),
        (replace("more", np.zeros(1, np.int32)), "arrays are"),
        (replace("tokens", np.zeros(8, np.int64)), "arrays are"),
        (replace("tokens", np.zeros((2, 4), np.int32)), "2 dimensions"),
        (replace("tokens", np.zeros(7, np.int32)), "7 tokens"),
        (replace("tokens", -np.ones(8, np.int32)), "negative"),
        (replace("offsets", np.array([0], np.int64)), "not one sequence"),
        (replace("offsets", np.array([1, 3, 8], np.int64)), "do not fit"),
        (replace("offsets", np.array([0, 9, 8], np.int64)), "sequence 1"),
        (replace("prompt_lens", np.array([0, 4], np.int32)), "sequence 0: prompt_len 0 of 3"),
        (replace("prompt_lens", np.array([1, 5], np.int32)), "sequence 1: prompt_len 5 of 5"),
        (replace("learner_greedy", np.zeros(2, np.int32)), "learner_greedy has 2 entries for 3"),
        (replace("learner_logps", np.zeros(4, np.float32)), "learner_logps has 4 entries for 3"),
        (replace("learner_logps", np.array([-1, np.nan, -1], np.float32)), "no log-probs"),
        (replace("learner_logps", np.array([-1, -np.inf, -1], np.float32)), "no log-probs"),
        (replace("learner_logps", np.array([-1, 0.5, -1], np.float32)), "no log-probs"),
    ],
)
def test_arrays_that_do_not_fit(path: Path, change: Callable[[dict[str, Any]], object], fragment: str) -> None:
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, METADATA)
    with pytest.raises(ArtifactError, match=fragment):
        read_probes(path)


@pytest.mark.parametrize(
    "change", [{"format": "probes-9"}, {"temperature": "hot"}, {"temperature": "0.0"}, {"temperature": "nan"}, {"weight_version": "-1"}]
)
def test_metadata_that_does_not_fit(path: Path, change: dict[str, str]) -> None:
    save_file(load_file(path), path, {**METADATA, **change})
    with pytest.raises(ArtifactError, match=r"format is|temperature"):
        read_probes(path)


@pytest.mark.parametrize("data", [b"", b"12345678", b"\xff" * 100])
def test_files_that_are_no_safetensors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(ArtifactError, match="no readable probes"):
        read_probes(tmp_path / "p")


def test_a_missing_or_truncated_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="no readable probes"):
        read_probes(path)
    with pytest.raises(ArtifactError, match="no readable probes"):
        read_probes(path.with_name("nowhere"))


def test_bad_probes_are_not_written(tmp_path: Path) -> None:
    bad = Probe(TokenSequence((1, 2), 1), np.array([np.nan], np.float32), np.array([1], np.int32))
    for probes in ((bad,), ()):
        with pytest.raises(ArtifactError):
            write_probes(tmp_path / "p", ProbeSet(probes, 1.0, 0))
    assert not list(tmp_path.iterdir())
