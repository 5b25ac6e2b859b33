"""Which suspect is named, where nothing about the artifact differs: on the fake engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from deploy_targets.artifact import PROBES_FILE, Manifest, check_artifact
from deploy_targets.blame import with_blame
from deploy_targets.engine_checks import check_engine
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.gates import Report
from deploy_targets.probes import read_probes
from deploy_targets.profile import TargetProfile, load_profile
from deploy_targets.verify import verify
from tests.artifacts import VERSION, make_artifact, seal
from tests.conftest import TinyModels


def blamed(folder: Path, manifest: Manifest, **options: float) -> Report:
    probes = read_probes(folder / PROBES_FILE)
    report = verify(folder, FakeEngine(folder, options, VERSION), check_artifact(folder), probes)

    def again(profile: TargetProfile) -> FakeEngine:
        return FakeEngine(folder, profile.engine.options, VERSION)

    return with_blame(report, probes, again)


def test_a_pass_blames_nothing(tiny_models: TinyModels, tmp_path: Path) -> None:
    report = blamed(tmp_path / "a", make_artifact(tiny_models("qwen2"), tmp_path / "a"))
    assert report.verdict == "pass"
    assert (report.blame, report.to_json()["blame_looked_at"]) == (None, [])


def test_the_part_that_has_the_gap_is_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    """The learner finds the first token of each response less probable than the engine, and no other."""
    shift = lambda logps: np.where(np.arange(len(logps)) == 0, logps - 3, logps)  # noqa: E731
    report = blamed(tmp_path / "a", make_artifact(tiny_models("qwen2"), tmp_path / "a", shift=shift, tolerance=0.002))
    assert report.blame is not None
    assert report.blame.cause is not None
    assert (report.blame.cause.kind, report.blame.cause.name) == ("part", "position: 0")
    assert report.blame.cause.explains == pytest.approx(1)
    looked_at = {suspect.name: suspect for suspect in report.blame.looked_at}
    assert looked_at["batches: one sequence at a time"].explains == pytest.approx(0)
    assert report.to_json()["blame"]["name"] == "position: 0"


def test_the_option_that_makes_the_gap_is_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    shutil.copytree(tiny_models("qwen2"), tmp_path / "a")
    profile = load_profile("fake")
    faulty = profile.model_copy(update={"engine": profile.engine.model_copy(update={"options": {"nan_logps": 0.2}})})
    engine = FakeEngine(tmp_path / "a", {}, VERSION)
    report = blamed(tmp_path / "a", seal(tmp_path / "a", engine, faulty), nan_logps=0.2)
    assert report.blame is not None
    assert "engine.options.nan_logps (here 0.2, tried 0.0) (explains 100% of the gap)" in report.blame.sentence


def test_the_engine_is_asked_before_anything_else(tiny_models: TinyModels, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen2"), tmp_path / "a")
    probes = read_probes(tmp_path / "a" / PROBES_FILE)
    checks = {check.name: check for check in check_engine(FakeEngine(tmp_path / "a", {}, VERSION), probes, 8, ())}
    assert checks.pop("normalised").passed is None, "these probes know neither the vocabulary nor the learner's top tokens"
    assert all(check.passed for check in checks.values()), checks
