"""Probes survive the file, and a file that holds none is an ArtifactError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deploy_targets.errors import ArtifactError
from deploy_targets.probes import KINDS, Kind, LearnerDetails, Probe, ProbeSet, read_probes, write_probes
from deploy_targets.types import TokenSequence

METADATA = {"format": "probes-2", "temperature": "0.7", "weight_version": "5"}


def probe(tokens: tuple[int, ...], prompt_len: int, kind: Kind = "policy", *, detailed: bool = True) -> Probe:
    num_scored = len(tokens) - prompt_len
    logps = -np.linspace(0.1, 2.0, num_scored, dtype=np.float32)
    ids = np.arange(num_scored * 3, dtype=np.int32).reshape(num_scored, 3)
    details = LearnerDetails(logps - 0.01, logps + 2, ids, -ids.astype(np.float32))
    return Probe(TokenSequence(tokens, prompt_len), logps, np.arange(num_scored, dtype=np.int32) + 1, kind, details if detailed else None)


PROBES = (probe((3, 4, 5), 1), probe((9, 8, 7, 6, 5), 4, "rare"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    probes = ProbeSet(PROBES, 0.7, 5, learner_dtype="bfloat16", source_model="m", vocab_size=10, vocabulary_sha256="ab")
    write_probes(tmp_path / "p.safetensors", probes)
    return tmp_path / "p.safetensors"


def test_round_trip(path: Path) -> None:
    read = read_probes(path)
    assert (read.temperature, read.weight_version) == (0.7, 5)
    assert (read.learner_dtype, read.source_model, read.vocab_size, read.vocabulary_sha256) == ("bfloat16", "m", 10, "ab")
    assert [p.sequence for p in read.probes] == [TokenSequence((3, 4, 5), 1), TokenSequence((9, 8, 7, 6, 5), 4)]
    assert [p.kind for p in read.probes] == ["policy", "rare"]
    for found, written in zip(read.probes, PROBES, strict=True):
        np.testing.assert_array_equal(found.learner_logps, written.learner_logps)
        np.testing.assert_array_equal(found.learner_greedy, written.learner_greedy)
        assert (found.learner_logps.dtype, found.learner_greedy.dtype) == (np.float32, np.int32)
        assert found.details is not None
        assert written.details is not None
        for name, dtype in {"logps_fp32": np.float32, "entropy": np.float32, "top_ids": np.int32, "top_logps": np.float32}.items():
            np.testing.assert_array_equal(getattr(found.details, name), getattr(written.details, name))
            assert getattr(found.details, name).dtype == dtype


def test_probes_without_details(tmp_path: Path) -> None:
    write_probes(tmp_path / "p", ProbeSet((probe((3, 4, 5), 1, detailed=False),), 1.0, 0))
    (read,) = read_probes(tmp_path / "p").probes
    assert read.details is None
    with pytest.raises(ArtifactError, match="entries for 4 scored"):
        write_probes(tmp_path / "q", ProbeSet((probe((3, 4, 5), 1, detailed=False), probe((3, 4, 5), 1)), 1.0, 0))


def test_kinds_are_taken_apart(path: Path) -> None:
    read = read_probes(path)
    assert [p.sequence for p in read.of_kind("rare").probes] == [PROBES[1].sequence]
    assert read.of_kind("rare").temperature == 0.7
    assert {kind: read.num_scored(kind) for kind in KINDS} == {"policy": 2, "greedy": 0, "long": 0, "rare": 1, "certain": 0}


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
        (lambda arrays: arrays.pop("kinds"), "arrays are"),
        (lambda arrays: arrays.pop("learner_entropy"), "arrays are"),
        (replace("learner_entropy", np.zeros(3, np.float64)), "arrays are"),
        (replace("learner_entropy", np.zeros(2, np.float32)), "learner_entropy has 2 entries"),
        (replace("learner_entropy", np.array([1, np.nan, 1], np.float32)), "no entropies"),
        (replace("learner_entropy", np.array([1, -1, 1], np.float32)), "no entropies"),
        (replace("learner_logps_fp32", np.array([-1, np.nan, -1], np.float32)), "learner_logps_fp32 holds values"),
        (replace("learner_top_logps", np.full((3, 3), np.inf, np.float32)), "learner_top_logps holds values"),
        (replace("learner_top_logps", np.array([[-2, -1, -3]] * 3, np.float32)), "do not fall"),
        (replace("learner_top_logps", np.zeros(9, np.float32)), "1 dimensions, expected 2"),
        (replace("learner_top_logps", np.zeros((3, 2), np.float32)), "3 tokens a position"),
        (replace("learner_top_ids", np.zeros((3, 0), np.int32)), "0 tokens a position"),
        (replace("learner_top_ids", -np.ones((3, 3), np.int32)), "learner_top_ids holds ids"),
        (replace("kinds", np.array([0], np.uint8)), "kinds has 1 entries"),
        (replace("kinds", np.array([0, 5], np.uint8)), "kinds holds numbers beyond 4"),
        (replace("kinds", np.array([1, 3], np.uint8)), "no probe of the kind 'policy'"),
    ],
)
def test_arrays_that_do_not_fit(path: Path, change: Callable[[dict[str, Any]], object], fragment: str) -> None:
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, METADATA)
    with pytest.raises(ArtifactError, match=fragment):
        read_probes(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "probes-9"},
        {"vocab_size": "0"},
        {"vocab_size": "few"},
        {"temperature": "hot"},
        {"temperature": "0.0"},
        {"temperature": "nan"},
        {"weight_version": "-1"},
    ],
)
def test_metadata_that_does_not_fit(path: Path, change: dict[str, str]) -> None:
    save_file(load_file(path), path, {**METADATA, **change})
    with pytest.raises(ArtifactError, match=r"format is|temperature"):
        read_probes(path)


def test_ids_beyond_the_vocabulary(path: Path) -> None:
    save_file(load_file(path), path, {**METADATA, "vocab_size": "9"})
    with pytest.raises(ArtifactError, match="tokens holds ids that are negative or beyond the vocabulary of 9"):
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
