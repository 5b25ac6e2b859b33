"""The bf16 reference engine, held in float32 against transformers' own generation and plain forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deploy_targets.engines.transformers import TransformersEngine
from deploy_targets.errors import EngineError, ProfileError
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels

PROMPTS = [[5, 6, 7], [8], [30, 29, 28, 27, 26, 25, 24], [8], [8]]


@pytest.fixture(scope="module")
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models("qwen3")


@pytest.fixture
def engine(model_dir: Path) -> TransformersEngine:
    return TransformersEngine(model_dir, {"dtype": "float32", "device": "cpu", "max_model_len": 64}, weight_version=1)


def test_greedy_tokens_are_those_of_transformers_generate(model_dir: Path, engine: TransformersEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for generation, prompt in zip(engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=0)), PROMPTS, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert generation.tokens.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("stops", [(), (4, 9, 15, 22, 31)])
def test_log_probs_are_exact_while_rows_leave_the_batch(model_dir: Path, engine: TransformersEngine, stops: tuple[int, ...]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generations = engine.generate(PROMPTS, Sampling(max_tokens=20, temperature=0.7, seed=4, stop_token_ids=stops))
    assert len({len(generation.tokens) for generation in generations}) > 1 or not stops
    for generation in generations:
        tokens = [*generation.prompt, *generation.tokens.tolist()]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([tokens])).logits[0] / 0.7, dim=-1).numpy()
        places = np.arange(len(generation.prompt) - 1, len(tokens) - 1)
        np.testing.assert_allclose(generation.logps, log_probs[places, generation.tokens], rtol=0, atol=1e-4)


def test_scores_do_not_depend_on_the_batch_size(model_dir: Path, engine: TransformersEngine) -> None:
    options = {"dtype": "float32", "device": "cpu", "score_batch_size": 1}
    sequences = [TokenSequence((*prompt, 9, 10, 11), len(prompt)) for prompt in PROMPTS]
    one_by_one = TransformersEngine(model_dir, options, weight_version=1).score(sequences)
    for batched, single in zip(engine.score(sequences), one_by_one, strict=True):
        np.testing.assert_allclose(batched.logps, single.logps, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(batched.greedy_tokens, single.greedy_tokens)


def test_an_update_with_another_shape_names_the_tensor(model_dir: Path, engine: TransformersEngine, tmp_path: Path) -> None:
    tensors = load_file(model_dir / WEIGHTS_FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    tensors["model.extra.weight"] = torch.zeros(1)
    write_weights(tmp_path / "wrong.safetensors", tensors.items(), len(tensors) + 1)
    with pytest.raises(EngineError) as caught:
        engine.update(WeightFile(tmp_path / "wrong.safetensors", 2))
    assert f"{name}: BF16 [256, 127], the engine has BF16 [256, 128]" in str(caught.value)
    assert "model.extra.weight: unknown" in str(caught.value)
    assert engine.weight_version == 1


def with_tensor(model_dir: Path, path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> WeightFile:
    """Version 2: the model with one tensor changed, which `write_weights` would not write where it is not finite."""
    tensors = load_file(model_dir / WEIGHTS_FILE)
    save_file({**tensors, name: change(tensors[name])}, path)
    return WeightFile(path, 2)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logits_that_overflow_are_nan_log_probs_and_no_crash(
    temperature: float, model_dir: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    """Every weight is finite, and every logit is an infinity of either sign."""
    engine.update(with_tensor(model_dir, tmp_path / "huge", "lm_head.weight", lambda weight: torch.full_like(weight, 3e38)))
    for generation in engine.generate(PROMPTS, Sampling(max_tokens=3, temperature=temperature, seed=1)):
        assert len(generation.tokens) == 3
        assert ((generation.tokens >= 0) & (generation.tokens < 36)).all()
        assert np.isnan(generation.logps).all()
    (score,) = engine.score([TokenSequence((5, 6, 7, 8), 2)], temperature or 1.0)
    assert np.isnan(score.logps).all()


def test_a_row_without_finite_logits_leaves_the_others_as_they_were(model_dir: Path, engine: TransformersEngine, tmp_path: Path) -> None:
    def lost(embedding: torch.Tensor) -> torch.Tensor:
        embedding[8] = torch.nan
        return embedding

    sampling = Sampling(max_tokens=4, seed=3)
    before = engine.generate(PROMPTS, sampling)
    engine.update(with_tensor(model_dir, tmp_path / "lost", "model.embed_tokens.weight", lost))
    for prompt, old, new in zip(PROMPTS, before, engine.generate(PROMPTS, sampling), strict=True):
        if prompt == [8]:
            assert np.isnan(new.logps).all()
        elif 8 not in old.tokens[:-1]:
            np.testing.assert_array_equal(new.tokens, old.tokens)
            np.testing.assert_array_equal(new.logps, old.logps)
    assert any(prompt != [8] and 8 not in old.tokens[:-1] for prompt, old in zip(PROMPTS, before, strict=True))


def test_a_file_that_ends_too_early_is_an_engine_error_and_changes_nothing(
    model_dir: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    sequence = [TokenSequence((5, 6, 7, 8), 2)]
    before = engine.score(sequence)[0].logps
    (tmp_path / "cut").write_bytes((model_dir / WEIGHTS_FILE).read_bytes()[:-64])
    with pytest.raises(EngineError, match="nothing was changed: SafetensorError"):
        engine.update(WeightFile(tmp_path / "cut", 2))
    assert engine.weight_version == 1
    np.testing.assert_array_equal(engine.score(sequence)[0].logps, before)


def test_what_pytorch_raises_is_an_engine_error(model_dir: Path, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(engine._model, "forward", out_of_memory)
    for call in (lambda: engine.generate(PROMPTS, Sampling(2)), lambda: engine.score([TokenSequence((5, 6), 1)])):
        with pytest.raises(EngineError, match="OutOfMemoryError: tried to allocate too much"):
            call()
    with pytest.raises(EngineError, match="'gpu0'"):
        TransformersEngine(model_dir, {"device": "gpu0"}, weight_version=1)


def test_an_update_that_fails_halfway_closes_the_engine(
    model_dir: Path, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds a mix of two versions, which must not be served."""
    name = list(engine._parameters)[3]
    monkeypatch.setitem(engine._parameters, name, torch.zeros(1))
    with pytest.raises(EngineError, match="was shut down: RuntimeError"):
        engine.update(WeightFile(model_dir / WEIGHTS_FILE, 2))
    with pytest.raises(EngineError, match="closed"):
        engine.generate(PROMPTS, Sampling(2))


def test_no_prompts_no_answers(engine: TransformersEngine) -> None:
    assert engine.generate([], Sampling(max_tokens=4)) == []
    assert engine.score([]) == []


def test_wrong_options_and_folders_are_named(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="dtype"):
        TransformersEngine(model_dir, {"dtype": "int4"}, weight_version=1)
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    with pytest.raises(EngineError, match=WEIGHTS_FILE):
        TransformersEngine(tmp_path, {}, weight_version=1)


def test_a_closed_engine_says_so(engine: TransformersEngine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate([[5]], Sampling(max_tokens=1))
