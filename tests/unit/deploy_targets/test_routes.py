"""Routes: which experts an engine sent its tokens to, held against an independent forward pass over the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy_targets.catalog import open_engine
from deploy_targets.engines.transformers import TransformersEngine
from deploy_targets.errors import EngineError, PreflightError
from deploy_targets.preflight import preflight
from deploy_targets.profile import EngineSpec, TargetProfile, load_profile
from deploy_targets.types import Generation, Sampling, TokenSequence
from tests.conftest import TinyModels

PROMPTS = [[5, 6, 7], [8], [30, 29, 28, 27, 26, 25, 24], [8], [8]]
OPTIONS = {"dtype": "float32", "device": "cpu", "max_model_len": 64}


def routes_of_transformers(model_dir: Path, tokens: list[int]) -> np.ndarray:
    """By the router logits that transformers itself hands out: [num_tokens, num_layers, 2]."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(2).indices for layer in logits], dim=1).numpy()


@pytest.mark.parametrize("stops", [(), (4, 9, 15, 22, 31)])
def test_routes_are_those_of_a_forward_pass_over_the_same_tokens(stops: tuple[int, ...], tiny_models: TinyModels) -> None:
    """With prompts padded on the left, equal prompts computed once, and rows that leave the batch when they end."""
    model_dir = tiny_models("qwen3_moe")
    engine = TransformersEngine(model_dir, {**OPTIONS, "return_routes": True}, weight_version=1)
    for seed in (4, 5):
        generations = engine.generate(PROMPTS, Sampling(max_tokens=12, temperature=0.7, seed=seed, stop_token_ids=stops))
        assert len({len(generation.tokens) for generation in generations}) > 1 or not stops
        for generation in generations:
            assert generation.routes is not None
            assert generation.routes.dtype == np.int16
            expected = routes_of_transformers(model_dir, [*generation.prompt, *generation.tokens.tolist()][:-1])
            assert len(np.unique(expected)) > 2, "the tokens go various ways"
            np.testing.assert_array_equal(generation.routes, expected)


def test_without_the_option_nothing_is_watched_and_with_it_nothing_else_changes(tiny_models: TinyModels) -> None:
    model_dir, sampling = tiny_models("qwen3_moe"), Sampling(max_tokens=6, seed=3)
    silent = TransformersEngine(model_dir, OPTIONS, weight_version=1)
    telling = TransformersEngine(model_dir, {**OPTIONS, "return_routes": True}, weight_version=1)
    assert silent._routers == []
    for quiet, told in zip(silent.generate(PROMPTS, sampling), telling.generate(PROMPTS, sampling), strict=True):
        assert quiet.routes is None
        np.testing.assert_array_equal(quiet.tokens, told.tokens)
        np.testing.assert_array_equal(quiet.logps, told.logps)
    telling.score([TokenSequence((5, 6, 7), 1)])
    assert all(not router._forward_hooks for router in telling._routers), "no hook outlives its call"


def own_process(**options: object) -> TargetProfile:
    return load_profile("bf16-transformers").model_copy(
        update={"engine": EngineSpec(name="transformers", process="own", options={**OPTIONS, **options})}
    )


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_routes_cross_the_process_border(told: bool, tiny_models: TinyModels) -> None:
    model_dir, sampling = tiny_models("qwen3_moe"), Sampling(max_tokens=5, seed=2)
    here = TransformersEngine(model_dir, {**OPTIONS, "return_routes": told, "num_threads": None}, weight_version=1)
    engine = open_engine(own_process(return_routes=told), model_dir, 1)
    try:
        for ours, theirs in zip(engine.generate(PROMPTS, sampling), here.generate(PROMPTS, sampling), strict=True):
            assert (ours.routes is None) == (not told)
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            if told:
                assert ours.routes is not None
                assert ours.routes.dtype == np.int16
                np.testing.assert_array_equal(ours.routes, theirs.routes)
    finally:
        engine.close()


def test_routes_belong_to_the_tokens_that_were_inputs() -> None:
    def made(num_routes: int) -> Generation:
        tokens, routes = np.array([7, 8, 9], np.int32), np.zeros((num_routes, 2, 2), np.int16)
        return Generation((5, 6), tokens, np.zeros(3, np.float32), 1, 1.0, "length", routes)

    assert made(4).routes is not None
    with pytest.raises(ValueError, match="routes of 5 tokens were given for 4 that were inputs"):
        made(5)


def test_models_whose_routes_are_not_known_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    profile = own_process(return_routes=True)
    preflight(profile, tiny_models("qwen3_moe"))
    with pytest.raises(PreflightError, match=r"return_routes: model_type 'qwen3' has no experts"):
        preflight(profile, tiny_models("qwen3"))
    other = Path(shutil.copytree(tiny_models("qwen3_moe"), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "olmoe"}))
    with pytest.raises(PreflightError, match=r"the routes of model_type 'olmoe' are not known here, only those of qwen3_moe"):
        preflight(profile, other)
    with pytest.raises(EngineError, match="'qwen3' has no experts"):
        TransformersEngine(tiny_models("qwen3"), {**OPTIONS, "return_routes": True}, weight_version=1)
    dense = tiny_models("qwen3_moe", extra_config={"mlp_only_layers": [0, 1]})
    with pytest.raises(EngineError, match="none of its layers has experts"):
        TransformersEngine(dense, {**OPTIONS, "return_routes": True}, weight_version=1)
