"""vLLM serving bf16, in a process of its own, and its errors as ours."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy_targets.catalog import make_quantizer, open_engine
from deploy_targets.engines.transformers import TransformersEngine
from deploy_targets.errors import EngineError, ProfileError, UsageError
from deploy_targets.profile import EngineSpec, SchemeSpec, TargetProfile, load_profile
from deploy_targets.protocols import Engine
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
SEQUENCES = [TokenSequence(tuple(range(3, 3 + length)), length // 2) for length in (6, 17, 32)]


def bf16_profile(**options: Any) -> TargetProfile:
    profile = load_profile("int4-vllm")
    spec = EngineSpec(name="vllm", process="own", options={**profile.engine.options, **options})
    return profile.model_copy(update={"engine": spec, "scheme": SchemeSpec(quantizer="none"), "max_model_len": 32})


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tiny_models("llama", max_position_embeddings=32)
    made = tmp_path_factory.mktemp("artifact")
    (made / WEIGHTS_FILE).write_bytes((model_dir / WEIGHTS_FILE).read_bytes())
    make_quantizer(bf16_profile(), model_dir).scaffold(model_dir, made)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    opened = open_engine(bf16_profile(max_logprobs=16), folder, 1)
    yield opened
    opened.close()


def test_scores_are_those_of_transformers_up_to_the_models_last_position(engine: Engine, folder: Path) -> None:
    reference = TransformersEngine(folder, {"device": "cpu"}, 1)
    for ours, theirs in zip(engine.score(SEQUENCES), reference.score(SEQUENCES), strict=True):
        assert np.abs(ours.logps - theirs.logps).max() < 0.15
        assert np.mean(ours.greedy_tokens == theirs.greedy_tokens) > 0.7


def test_a_response_fills_the_models_last_position(engine: Engine) -> None:
    (generation,) = engine.generate([[5, 6]], Sampling(max_tokens=100))
    assert len(generation.tokens) == 30
    assert generation.finish_reason == "length"


def test_other_temperatures_need_the_whole_vocabulary(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"engine\.options\.max_logprobs is 16"):
        engine.score(SEQUENCES, temperature=0.7)


def test_a_head_that_nothing_ignores_is_served_quantized(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Its updates too; 64 tokens, as the kernels want output sizes in multiples of 32."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models("qwen3"), dtype=torch.bfloat16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(64, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    profile = load_profile("int4-vllm")
    profile = profile.model_copy(update={"max_model_len": 32, "scheme": profile.scheme.model_copy(update={"ignore": ()})})
    quantizer = make_quantizer(profile, tmp_path / "model")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("weight")}
    doubled = {**weights, "lm_head.weight": 2 * weights["lm_head.weight"]}
    assert quantizer.offenders({name: tuple(tensor.shape) for name, tensor in weights.items()}) == []
    (tmp_path / "served").mkdir()
    update = WeightFile(tmp_path / "doubled.safetensors", 2)
    write_weights(tmp_path / "served" / WEIGHTS_FILE, quantizer.quantize(weights.items()), 4 * len(weights))
    write_weights(update.path, quantizer.quantize(doubled.items()), 4 * len(weights))
    quantizer.scaffold(tmp_path / "model", tmp_path / "served")
    engine = open_engine(profile, tmp_path / "served", 1)
    try:
        for served in (weights, doubled):
            model.load_state_dict({name: quantizer.dequantized(name, tensor) for name, tensor in served.items()}, strict=False)
            for sequence, score in zip(SEQUENCES, engine.score(SEQUENCES), strict=True):
                with torch.no_grad():
                    log_probs = torch.log_softmax(model(torch.tensor([sequence.tokens])).logits[0].float(), dim=-1)
                given = torch.tensor(sequence.tokens[sequence.prompt_len :])
                expected = log_probs[sequence.prompt_len - 1 : -1].gather(1, given[:, None])[:, 0].numpy()
                assert np.abs(score.logps - expected).max() < 0.15
            engine.update(update)
    finally:
        engine.close()


def test_wrong_options_name_those_that_exist(folder: Path) -> None:
    with pytest.raises(ProfileError, match="kv_cache_gib") as caught:
        open_engine(bf16_profile(kv_cache_gb=1, dtype="int4"), folder, 1)
    assert [line.split(":")[0] for line in caught.value.offenders] == ["dtype", "kv_cache_gb"]


def test_a_folder_that_vllm_cannot_serve_fails_with_its_reason(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyKnowsThis"], "model_type": "nobody"}))
    (tmp_path / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
    with pytest.raises(EngineError, match="nobody"):
        open_engine(bf16_profile(), tmp_path, 1)
