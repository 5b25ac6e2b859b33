"""Engines that are started anew for each version: the fake engine stands for a runtime that cannot swap weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_targets.catalog import open_engine
from deploy_targets.engines.rebuild import RebuildingEngine
from deploy_targets.errors import EngineError
from deploy_targets.types import Sampling, WeightFile
from tests.conftest import TinyModels
from tests.contract.targets import Target, largest_gap, make_target, random_sequences


@pytest.fixture
def target(tiny_models: TinyModels, tmp_path: Path) -> Target:
    return make_target("fake", tiny_models("qwen3", max_position_embeddings=512), tmp_path)


def rebuilt(target: Target) -> RebuildingEngine:
    engine = target.profile.engine.model_copy(update={"publish": "rebuild"})
    opened = open_engine(target.profile.model_copy(update={"engine": engine}), target.folder, 1)
    assert isinstance(opened, RebuildingEngine)
    return opened


def test_every_update_is_a_fresh_engine_on_the_new_weights(target: Target) -> None:
    engine, plain = rebuilt(target), target.open()
    sequences = random_sequences(4)
    for version, weight_version in ((1, 2), (2, 3), (1, 4)):
        assert engine.update(target.weights(version, weight_version)) == plain.update(target.weights(version, weight_version))
        assert largest_gap(engine.score(sequences), plain.score(sequences)) == 0
        (answer,) = engine.generate([[5, 6]], Sampling(max_tokens=2))
        assert answer.weight_version == weight_version


def test_the_file_may_change_its_name_after_the_update(target: Target) -> None:
    """A publish renames the file that was proven."""
    engine, sequences = rebuilt(target), random_sequences(4)
    pending = target.versions[2].with_name("pending")
    pending.write_bytes(target.versions[2].read_bytes())
    engine.update(WeightFile(pending, 2))
    before = engine.score(sequences)
    pending.rename(target.versions[1])
    assert largest_gap(engine.score(sequences), before) == 0


def test_a_file_that_does_not_fit_leaves_the_old_engine_running(target: Target, tmp_path: Path) -> None:
    engine, sequences = rebuilt(target), random_sequences(4)
    before = engine.score(sequences)
    with pytest.raises(EngineError, match="nowhere"):
        engine.update(WeightFile(tmp_path / "nowhere.safetensors", 2))
    assert engine.weight_version == 1
    assert largest_gap(engine.score(sequences), before) == 0


def test_closed_is_closed(target: Target) -> None:
    engine = rebuilt(target)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.score(random_sequences(1))
