"""One suite for every engine: what `deploy_targets.protocols.Engine` promises, held against real runtimes and real weights.

Each target is opened on two models through the same calls that a training run makes: quantize, write, scaffold, open.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy_targets.catalog import is_rebuilt
from deploy_targets.errors import EngineError, UsageError, WeightsError
from deploy_targets.profile import shipped_profiles
from deploy_targets.protocols import Engine
from deploy_targets.types import Sampling, TokenSequence, WeightFile
from deploy_targets.weights_file import weights_name
from hetero_rl.publish import ProbeProbabilities, proof_failure
from tests.conftest import TinyModels
from tests.contract.targets import (
    MAX_MODEL_LEN,
    Target,
    all_logps,
    biased_model,
    largest_gap,
    load_reference,
    make_target,
    mean_limit,
    model_logps,
    model_options,
    random_prompts,
    random_sequences,
    reference_logps,
)

FAMILIES = {"fake", "bf16-transformers", "nf4-transformers", "fp8-vllm", "int4-vllm", "int4-gptq-vllm", "int4-onnx", "q4_k_m-llamacpp"}
"""One or two targets of each family; scripts/test_targets.sh holds the rest against the same tests."""


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [mark for mark, given in ((pytest.mark.slow, "-vllm" in name), (pytest.mark.variant, name not in FAMILIES)) if given]


PROFILES = shipped_profiles()
TARGETS = [pytest.param(name, marks=marks(name)) for name in PROFILES]
FP8_CACHES = [
    pytest.param(name, marks=marks(name))
    for name, profile in PROFILES.items()
    if str(profile.engine.options.get("kv_cache_dtype", "")).startswith("fp8")
]
TEMPERATURES = [0.7, 1.0, 1.3]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument in ("target", "name"):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, metafunc.config.getoption("--target") or TARGETS, indirect=argument == "target", scope="module")


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Target:
    model_dir = tiny_models("qwen3", max_position_embeddings=512, **model_options(request.param))
    return make_target(request.param, model_dir, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def shared_engine(target: Target) -> Iterator[Engine]:
    opened = target.open()
    yield opened
    opened.close()


@pytest.fixture
def engine(target: Target, shared_engine: Engine) -> Iterator[Engine]:
    """The module's engine, serving version 1 of the weights as weight_version 1 before and after each test."""
    yield shared_engine
    if shared_engine.weight_version != 1:
        shared_engine.update(target.weights(1, 1))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logps_of_generate_are_those_of_score(target: Target, engine: Engine, temperature: float) -> None:
    generations = engine.generate(random_prompts(12), Sampling(max_tokens=16, temperature=temperature, seed=5))
    sequences = [g.sequence for g in generations]
    scores = engine.score(sequences, temperature)
    for generation, score in zip(generations, scores, strict=True):
        assert generation.temperature == score.temperature == temperature
        assert generation.tokens.dtype == score.greedy_tokens.dtype == np.int32
        assert generation.logps.dtype == score.logps.dtype == np.float32
        np.testing.assert_allclose(generation.logps, score.logps, rtol=0, atol=target.tolerance)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_tokens_are_drawn_from_the_scored_distribution(engine: Engine, temperature: float) -> None:
    prompt, num_draws, vocab_size = [7, 11, 5], 3000, 36
    generations = engine.generate([prompt] * num_draws, Sampling(max_tokens=1, temperature=temperature, seed=2))
    scores = engine.score([TokenSequence((*prompt, token), 3) for token in range(vocab_size)], temperature)
    expected = np.exp(all_logps(scores))
    assert expected.sum() == pytest.approx(1, abs=0.02)
    counts = np.bincount([generation.tokens[0] for generation in generations], minlength=vocab_size)
    chi_square = float(((counts - num_draws * expected) ** 2 / (num_draws * expected)).sum())
    # Mean 35, standard deviation sqrt(70) for a fair sampler: ten deviations.
    assert chi_square < vocab_size - 1 + 10 * math.sqrt(2 * (vocab_size - 1))


def test_temperature_zero_is_greedy_with_logps_at_temperature_one(target: Target, engine: Engine) -> None:
    generations = engine.generate(random_prompts(8), Sampling(max_tokens=8, temperature=0))
    scores = engine.score([g.sequence for g in generations])
    pairs = list(zip(generations, scores, strict=True))
    greedy = engine.score([TokenSequence((*g.prompt, *s.greedy_tokens.tolist()), len(g.prompt)) for g, s in pairs])
    for generation, score, best in zip(generations, scores, greedy, strict=True):
        assert generation.temperature == 0
        np.testing.assert_allclose(generation.logps, score.logps, rtol=0, atol=target.tolerance)
        # Up to a tie within rounding, what was generated is what the scores call most probable.
        assert best.logps[0] - score.logps[0] <= target.tolerance
    assert np.mean([g.tokens[0] == s.greedy_tokens[0] for g, s in pairs]) > 0.7


def test_equal_calls_give_equal_answers_and_seeds_differ(engine: Engine) -> None:
    prompts = random_prompts(6)
    sampling = Sampling(max_tokens=12, seed=3)
    first, again, other = (engine.generate(prompts, s) for s in (sampling, sampling, replace(sampling, seed=4)))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.logps, two.logps)
    assert [g.tokens.tolist() for g in first] != [g.tokens.tolist() for g in other]


def test_equal_neighbours_are_different_draws(engine: Engine) -> None:
    prompts = [[5, 6, 7]] * 6 + [[8, 9]] * 6
    generations = engine.generate(prompts, Sampling(max_tokens=12, seed=1))
    assert [list(generation.prompt) for generation in generations] == prompts
    assert len({tuple(generation.tokens.tolist()) for generation in generations}) == len(prompts)


def test_a_ragged_batch_equals_one_by_one(target: Target, engine: Engine) -> None:
    sequences = random_sequences(9)
    together, alone = engine.score(sequences), [engine.score([sequence])[0] for sequence in sequences]
    assert largest_gap(together, alone) <= target.tolerance
    prompts = random_prompts(5, seed=7)
    greedy = Sampling(max_tokens=6, temperature=0)
    for batched, prompt in zip(engine.generate(prompts, greedy), prompts, strict=True):
        single = engine.generate([prompt, prompt], greedy)[1]
        # Greedy paths may part at a tie within rounding, not before.
        differ = np.flatnonzero(batched.tokens != single.tokens)
        same_until = int(differ[0]) + 1 if len(differ) else len(single.tokens)
        np.testing.assert_allclose(batched.logps[:same_until], single.logps[:same_until], rtol=0, atol=target.tolerance)


def test_updates_equal_a_fresh_engine_and_going_back_restores(target: Target, engine: Engine) -> None:
    sequences = random_sequences(8)
    before = engine.score(sequences)
    assert engine.update(target.weights(2, 2)) == engine.weight_version == 2
    assert engine.update(target.weights(1, 3)) == 3
    assert engine.update(target.weights(2, 4)) == 4
    updated = engine.score(sequences)
    assert largest_gap(updated, before) > max(0.2, 2 * target.tolerance)
    fresh_folder = target.folder.parent / "fresh"
    fresh_folder.mkdir()
    (fresh_folder / weights_name(target.quantizer)).write_bytes(target.versions[2].read_bytes())
    target.quantizer.scaffold(target.model_dir, fresh_folder)
    fresh = replace(target, folder=fresh_folder).open(weight_version=4)
    try:
        assert largest_gap(updated, fresh.score(sequences)) == 0
    finally:
        fresh.close()
    engine.update(target.weights(1, 5))
    assert largest_gap(engine.score(sequences), before) == 0


def test_publishing_the_same_weights_twenty_times_drifts_by_nothing(target: Target, engine: Engine) -> None:
    num_publishes = 2 if is_rebuilt(target.profile, target.folder) else 20
    sequences, prompts, sampling = random_sequences(6), random_prompts(6), Sampling(max_tokens=8, seed=9)
    scores, generations = engine.score(sequences), engine.generate(prompts, sampling)
    for weight_version in range(2, 2 + num_publishes):
        engine.update(target.weights(1, weight_version))
        assert largest_gap(engine.score(sequences), scores) == 0
    for before, after in zip(generations, engine.generate(prompts, sampling), strict=True):
        np.testing.assert_array_equal(before.tokens, after.tokens)
        np.testing.assert_array_equal(before.logps, after.logps)


def test_every_answer_says_which_weights_made_it(target: Target, engine: Engine) -> None:
    for weight_version in (1, 17, 18):
        if weight_version != 1:
            engine.update(target.weights(2, weight_version))
        generations = engine.generate([[5], [6, 7]], Sampling(max_tokens=2))
        scores = engine.score(random_sequences(2))
        assert {answer.weight_version for answer in (*generations, *scores)} == {weight_version}


def test_one_token_and_as_many_as_fit(engine: Engine) -> None:
    (short,) = engine.generate([[5, 6, 7]], Sampling(max_tokens=1))
    assert (len(short.tokens), short.finish_reason) == (1, "length")
    prompts = [[5], [5, 6, 7, 8], list(range(3, 3 + 30))]
    for generation in engine.generate(prompts, Sampling(max_tokens=MAX_MODEL_LEN)):
        assert len(generation.prompt) + len(generation.tokens) == MAX_MODEL_LEN
        assert generation.finish_reason == "length"
        assert np.isfinite(generation.logps).all()
        (score,) = engine.score([generation.sequence])
        assert len(score.logps) == len(generation.tokens)


def test_a_stop_token_ends_the_response_and_belongs_to_it(engine: Engine) -> None:
    stops = (2, 5, 9, 14)
    generations = engine.generate(random_prompts(24), Sampling(max_tokens=20, seed=8, stop_token_ids=stops))
    for generation in generations:
        *body, last = generation.tokens.tolist()
        assert not set(body) & set(stops)
        assert (last in stops) == (generation.finish_reason == "stop")
        assert len(generation.logps) == len(generation.tokens) <= 20
        assert generation.finish_reason == "stop" or len(generation.tokens) == 20
    assert {generation.finish_reason for generation in generations} == {"stop", "length"}


def test_the_models_own_end_token_does_not_stop_unless_asked(engine: Engine) -> None:
    generations = engine.generate([[5, 6]] * 64, Sampling(max_tokens=20, temperature=1.3, seed=1))
    assert any(2 in generation.tokens[:-1] for generation in generations), "64 x 20 tokens without <eos>: the test sees nothing"
    assert all(len(generation.tokens) == 20 for generation in generations)


def test_prompts_that_cannot_be_served_are_refused(engine: Engine) -> None:
    for prompt in ([], [36], [-1], [5] * MAX_MODEL_LEN):
        with pytest.raises(UsageError):
            engine.generate([[5, 6], prompt], Sampling(max_tokens=2))
    with pytest.raises(UsageError):
        engine.score([TokenSequence((5,) * (MAX_MODEL_LEN + 1), 1)])


def test_a_file_of_another_model_is_refused_and_changes_nothing(target: Target, engine: Engine, tmp_path: Path) -> None:
    lost = target.write_without_last_tensor(tmp_path / "short")
    sequences = random_sequences(4)
    before = engine.score(sequences)
    with pytest.raises(EngineError, match=lost):
        engine.update(WeightFile(tmp_path / "short", 9))
    with pytest.raises(EngineError, match="nowhere"):
        engine.update(WeightFile(tmp_path / "nowhere", 9))
    assert engine.weight_version == 1
    assert largest_gap(engine.score(sequences), before) == 0


def test_scores_are_those_of_the_dequantized_model(target: Target, engine: Engine) -> None:
    if target.profile.name == "fake":
        pytest.skip("the fake engine runs no model")
    sequences = random_sequences(8)
    logps = all_logps(engine.score(sequences))
    gap = np.abs(logps - reference_logps(target, sequences))
    assert gap.mean() < mean_limit(target.tolerance)
    assert gap.max() < 2 * target.tolerance
    if target.profile.scheme.bits < 16:
        unrounded = np.abs(logps - model_logps(load_reference(target.model_dir), sequences))
        assert gap.mean() < unrounded.mean() / 2, "these might be the scores of weights that nobody rounded"


@pytest.mark.parametrize("profile_name", FP8_CACHES)
def test_an_fp8_cache_is_no_other_one(profile_name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    """On the model with large biases, whose keys FP8 rounds enough to see. Equal engines with equal caches have equal scores."""
    target = make_target(profile_name, biased_model(tiny_models), tmp_path)
    options = {**target.profile.engine.options, "kv_cache_dtype": "auto"}
    spec = target.profile.engine.model_copy(update={"options": options})
    sequences = random_sequences(8)
    logps = []
    for opened in (target, replace(target, profile=target.profile.model_copy(update={"engine": spec}))):
        engine = opened.open()
        logps.append(all_logps(engine.score(sequences)))
        engine.close()
    assert np.abs(logps[0] - logps[1]).mean() > 0.01


def test_a_scale_changed_on_purpose_is_caught_by_the_proof(target: Target, engine: Engine, tmp_path: Path) -> None:
    if target.profile.name == "fake":
        pytest.skip("the fake engine runs no model")
    sequences = random_sequences(16)
    twin = np.exp(reference_logps(target, sequences))

    def measured() -> ProbeProbabilities:
        return ProbeProbabilities(twin, np.exp(all_logps(engine.score(sequences))))

    honest = measured()
    assert proof_failure(honest, None, honest.gap) is None
    tensors = target.tensors()
    # Four times the weight is four times its scales.
    changed = tensors | {name: 4 * tensor for name, tensor in tensors.items() if name == "model.layers.1.self_attn.o_proj.weight"}
    engine.update(WeightFile(target.write(tmp_path / "changed.safetensors", changed), 2))
    assert proof_failure(measured(), None, honest.gap) is not None


def test_near_certain_tokens_have_finite_logps(target: Target, engine: Engine, tmp_path: Path) -> None:
    if target.profile.name == "fake":
        pytest.skip("the fake engine runs no model")
    tensors = target.tensors()
    certain = tensors | {"model.norm.weight": 60 * tensors["model.norm.weight"]}
    engine.update(WeightFile(target.write(tmp_path / "certain.safetensors", certain), 2))
    generations = engine.generate(random_prompts(8), Sampling(max_tokens=8, seed=1))
    logps = np.concatenate([generation.logps for generation in generations])
    assert np.isfinite(logps).all()
    assert logps.max() <= 1e-5
    assert (logps > -1e-4).mean() > 0.3, "too few tokens are near-certain: the test sees nothing"
    scores = engine.score([generation.sequence for generation in generations])
    assert np.isfinite(all_logps(scores)).all()
    # Logits of some hundreds: one step of bf16 there is a nat.
    assert np.abs(np.exp(all_logps(scores)) - np.exp(logps)).mean() < 0.05


def test_weights_that_are_not_finite_never_become_a_file(target: Target, tmp_path: Path) -> None:
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"):
        for value in (float("nan"), float("inf")):
            tensors = target.tensors()
            tensors[name].view(-1)[7] = value
            with pytest.raises(WeightsError, match=re.escape(name.rsplit(".", 2)[1])):
                target.write(tmp_path / "bad.safetensors", tensors)
            assert not list(tmp_path.iterdir())


def test_a_model_with_biases_and_tied_embeddings(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_engine(make_target(name, biased_model(tiny_models, name), tmp_path))


def on(names: list[str], always: set[str]) -> list[object]:
    """Parameters for `names`; a vLLM target is slow, and all but those in `always` are variants."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * ("vllm" in name) + [pytest.mark.variant] * (name not in always)) for name in names
    ]


@pytest.mark.parametrize(
    "profile_name", on(["bf16-transformers", "bf16-vllm", "fp8-vllm", "int8-vllm", "int4-vllm"], always={"bf16-transformers", "int4-vllm"})
)
def test_a_model_with_fused_layers_partial_rotation_and_a_window(profile_name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_engine(make_target(profile_name, tiny_models("phi3", extra_config={"sliding_window": 12}), tmp_path))


@pytest.mark.parametrize("profile_name", on(["bf16-transformers", "bf16-vllm", "fp16-vllm"], always={"bf16-transformers"}))
def test_a_mixture_of_experts(profile_name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_engine(make_target(profile_name, tiny_models("qwen3_moe"), tmp_path))


def check_engine(target: Target) -> None:
    """Scores are those of the dequantized model, updates take effect and can be taken back exactly."""
    engine = target.open(weight_version=1)
    try:
        sequences = random_sequences(8)
        scores = engine.score(sequences)
        if target.profile.name != "fake":
            gap = np.abs(all_logps(scores) - reference_logps(target, sequences))
            assert gap.mean() < mean_limit(target.tolerance)
        engine.update(target.weights(2, 2))
        assert largest_gap(engine.score(sequences), scores) > 0.05
        engine.update(target.weights(1, 3))
        assert largest_gap(engine.score(sequences), scores) == 0
        generations = engine.generate(random_prompts(4), Sampling(max_tokens=4))
        assert all(np.isfinite(generation.logps).all() for generation in generations)
    finally:
        engine.close()
        engine.close()
