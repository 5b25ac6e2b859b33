"""The publisher with a real learner and a real engine: swap, proof, rebuild, refusal of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deploy_targets.catalog import make_quantizer
from deploy_targets.errors import EngineError, ProofError, WeightsError
from deploy_targets.profile import load_profile
from deploy_targets.types import WEIGHTS_FILE, TokenSequence, WeightFile
from deploy_targets.weights_file import sha256_of, write_version
from hetero_rl.publish import Publisher, evenly, probabilities
from hetero_rl.types import TrainSequence
from tests.conftest import TinyModels
from tests.learners import unconstrained

PROBES = [TokenSequence(tuple(range(3 + i, 15 + i)), 4) for i in range(8)]


@pytest.fixture
def publisher(tiny_models: TinyModels, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Publisher]:
    """Parametrized by its learning rate."""
    model_dir, profile = tiny_models("qwen3"), load_profile("int4-onnx")
    quantizer = make_quantizer(profile, model_dir)
    learner = unconstrained(model_dir, quantizer, lr=getattr(request, "param", 1e-2), warmup_steps=0)
    publisher = Publisher(learner, quantizer, profile, model_dir, tmp_path / "serving")
    publisher.calibrate(PROBES)
    yield publisher
    publisher.close()
    learner.close()


def move(publisher: Publisher) -> None:
    """One optimizer step, so that there is something to publish."""
    tokens = np.arange(5, 12, dtype=np.int32)
    publisher._learner.update([TrainSequence((3, 4), tokens, np.full(7, -3.0, np.float32), 1.0)], 0.0)


def test_publish_swaps_proves_and_keeps_the_bytes_it_served(publisher: Publisher) -> None:
    before = sha256_of(publisher.folder / WEIGHTS_FILE)
    move(publisher)
    stats = publisher.publish(1)
    assert publisher.engine.weight_version == 1
    assert stats.proof_gap < 0.01
    assert publisher.num_rebuilds == 0
    assert sha256_of(publisher.folder / WEIGHTS_FILE) != before
    assert not list(publisher.folder.glob("*.next"))


def test_the_file_is_the_one_that_the_engine_was_given(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 1, where it can break: between what is handed to the engine and what lies in the folder, which is what export copies."""
    given: list[str] = []
    update = publisher.engine.update

    def recorded(weights: WeightFile) -> int:
        given.append(sha256_of(weights.path))
        return update(weights)

    monkeypatch.setattr(publisher.engine, "update", recorded)
    for version in (1, 2):
        move(publisher)
        publisher.publish(version)
        assert given[-1] == sha256_of(publisher.folder / WEIGHTS_FILE)
    assert len(set(given)) == 2


def test_an_engine_of_another_model_is_refused_at_the_start(publisher: Publisher, tiny_models: TinyModels, tmp_path: Path) -> None:
    """Its probabilities are all small, and so is every gap between them."""
    other = tiny_models("qwen3", seed=1)
    tensors = load_file(other / WEIGHTS_FILE)
    quantizer = make_quantizer(load_profile("int4-onnx"), other)
    write_version(tmp_path / "other", quantizer, iter(tensors.items()), other, num_tensors_max=1000)
    publisher.engine.update(WeightFile(tmp_path / "other", 0))
    with pytest.raises(ProofError, match="does not compute with the published weights: mean abs"):
        publisher.calibrate(PROBES)


def test_nothing_learned_publishes_the_same_bytes(publisher: Publisher) -> None:
    before, scores = sha256_of(publisher.folder / WEIGHTS_FILE), publisher.engine.score(PROBES)
    for version in range(1, 4):
        publisher.publish(version)
    assert sha256_of(publisher.folder / WEIGHTS_FILE) == before
    assert all((a.logps == b.logps).all() for a, b in zip(scores, publisher.engine.score(PROBES), strict=True))


def test_an_engine_that_fails_to_update_is_rebuilt(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weights: WeightFile) -> int:
        raise EngineError(f"no {weights.weight_version}")

    monkeypatch.setattr(publisher.engine, "update", refuse)
    move(publisher)
    publisher.publish(1)
    assert publisher.num_rebuilds == 1
    assert publisher.engine.weight_version == 1
    move(publisher)
    publisher.publish(2)
    assert publisher.num_rebuilds == 1


def test_an_engine_that_keeps_the_old_weights_is_rebuilt(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher.engine, "update", lambda weights: weights.weight_version)
    for _ in range(3):
        move(publisher)
    publisher.publish(1)
    assert publisher.num_rebuilds == 1


def test_an_engine_that_fails_while_it_is_asked_is_rebuilt(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(sequences: object, temperature: float = 1.0) -> None:
        raise EngineError("it died")

    monkeypatch.setattr(publisher.engine, "score", die)
    move(publisher)
    publisher.publish(1)
    assert publisher.num_rebuilds == 1
    assert "it died" in publisher.rebuilt_because


def test_what_was_never_proven_does_not_stay(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the updated nor the rebuilt engine answers right: the run stops, and the folder holds the last proven weights alone."""
    before, files = sha256_of(publisher.folder / WEIGHTS_FILE), sorted(file.name for file in publisher.folder.iterdir())
    monkeypatch.setattr("hetero_rl.publish.proof_failure", lambda *_: "it answers wrong")
    move(publisher)
    with pytest.raises(ProofError, match=r"update 1 is not served by .*: it answers wrong\. A rebuilt engine fails as well"):
        publisher.publish(1)
    assert sha256_of(publisher.folder / WEIGHTS_FILE) == before
    assert sorted(file.name for file in publisher.folder.iterdir()) == files


def test_nan_weights_never_reach_the_engine(publisher: Publisher) -> None:
    before = sha256_of(publisher.folder / WEIGHTS_FILE)
    with torch.no_grad():
        dict(publisher._learner.policy.lm.named_parameters())["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    with pytest.raises(WeightsError, match=r"layers\.1"):
        publisher.publish(1)
    assert sha256_of(publisher.folder / WEIGHTS_FILE) == before
    assert publisher.engine.weight_version == 0


@pytest.mark.parametrize("publisher", [5e-5], indirect=True)
def test_an_engine_that_never_updates_is_caught_however_small_the_steps(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """No single step moves the probabilities enough to tell; what is held against the engine adds up over the steps."""
    before = probabilities(publisher._learner.score(PROBES, as_twin=True))
    move(publisher)
    one_step = float(np.abs(probabilities(publisher._learner.score(PROBES, as_twin=True)) - before).mean())
    monkeypatch.setattr(publisher, "_reference_gap", one_step)  # kernels that blur as much as a step moves
    monkeypatch.setattr(publisher.engine, "update", lambda weights: weights.weight_version)
    num_published = 0
    while publisher.num_rebuilds == 0 and num_published < 20:
        num_published += 1
        publisher.publish(num_published)
        move(publisher)
    assert publisher.num_rebuilds == 1
    assert num_published > 1


def test_an_engine_that_does_not_answer_has_not_failed_its_proof(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights may be as good as any: a checkpoint of them is one to go on from."""

    def gone(*arguments: object) -> None:
        raise EngineError("its machine is gone")

    move(publisher)
    monkeypatch.setattr(type(publisher.engine), "score", gone)
    with pytest.raises(EngineError, match=r"update 1 could not be proven: .*its machine is gone.*A rebuilt engine fails as well"):
        publisher.publish(1)


def test_a_quantizer_that_is_not_calibrated_costs_nothing(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(sequences: object) -> None:
        raise AssertionError("the model read sequences that nobody needs")

    monkeypatch.setattr(publisher._learner, "calibrate", read)
    assert not publisher.awaits_calibration
    publisher.publish(1, PROBES)
    assert publisher.calibration == ()


def test_calibration_sequences_are_taken_evenly() -> None:
    assert evenly(PROBES, 8) == PROBES
    assert evenly(PROBES, 100) == PROBES
    assert evenly(PROBES, 3) == [PROBES[0], PROBES[2], PROBES[5]]
