"""The public fake: its log-probs depend on every weight, and its faults happen when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deploy_targets.engines.fake import FakeEngine
from deploy_targets.errors import EngineError, ProfileError
from deploy_targets.quantizers.model_files import read_config, write_model_files
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels

SEQUENCE = TokenSequence((5, 6, 7, 8, 9, 10), 2)


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    model_dir = tiny_models("qwen2")
    made = tmp_path / "artifact"
    made.mkdir()
    write_model_files(model_dir, made, read_config(model_dir))
    (made / WEIGHTS_FILE).write_bytes((model_dir / WEIGHTS_FILE).read_bytes())
    return made


def changed_weights(folder: Path, name: str, path: Path) -> WeightFile:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[name] = tensors[name] + 0.1 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    write_weights(path, tensors.items(), len(tensors) + 1)
    return WeightFile(path, 2)


def open_fake(folder: Path, **options: Any) -> FakeEngine:
    return FakeEngine(folder, options, weight_version=1)


def test_every_tensor_changes_the_log_probs(folder: Path, tmp_path: Path) -> None:
    before = open_fake(folder).score([SEQUENCE])[0].logps
    for name in load_file(folder / WEIGHTS_FILE):
        engine = open_fake(folder)
        assert engine.update(changed_weights(folder, name, tmp_path / "changed.safetensors")) == 2
        assert np.abs(engine.score([SEQUENCE])[0].logps - before).max() > 1e-4, name


def test_log_probs_depend_on_the_tokens_before(folder: Path) -> None:
    engine = open_fake(folder)
    first, second = engine.score([TokenSequence((5, 6, 7), 2), TokenSequence((9, 6, 7), 2)])
    assert first.logps[0] != second.logps[0]


def test_a_share_of_log_probs_is_nan(folder: Path) -> None:
    engine = open_fake(folder, nan_logps=0.25)
    generations = engine.generate([[5]] * 40, Sampling(max_tokens=50))
    share = np.isnan(np.concatenate([generation.logps for generation in generations])).mean()
    assert share == pytest.approx(0.25, abs=0.05)


def test_a_stale_engine_reports_the_new_version_and_serves_the_old_one(folder: Path, tmp_path: Path) -> None:
    engine = open_fake(folder, stale=True)
    before = engine.score([SEQUENCE])[0].logps
    assert engine.update(changed_weights(folder, "lm_head.weight", tmp_path / "changed.safetensors")) == 2
    after = engine.score([SEQUENCE])[0]
    assert after.weight_version == 2
    np.testing.assert_array_equal(after.logps, before)


def test_updates_fail_as_often_as_asked(folder: Path) -> None:
    engine = open_fake(folder, fail_updates=2)
    weights = WeightFile(folder / WEIGHTS_FILE, 2)
    for _ in range(2):
        with pytest.raises(EngineError, match="fail_updates"):
            engine.update(weights)
    assert engine.weight_version == 1
    assert engine.update(weights) == 2


def test_options_it_does_not_know_are_refused_with_those_it_knows(folder: Path) -> None:
    with pytest.raises(ProfileError, match="nan_logps") as caught:
        open_fake(folder, nan_share=0.5, stale="perhaps")
    assert len(caught.value.offenders) == 2


def test_quantized_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    write_weights(folder / WEIGHTS_FILE, tensors.items(), len(tensors) + 1)
    with pytest.raises(EngineError, match="I8"):
        open_fake(folder)


def test_a_closed_engine_says_so(folder: Path) -> None:
    engine = open_fake(folder)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.score([SEQUENCE])
