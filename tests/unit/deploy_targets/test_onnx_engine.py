"""The ONNX Runtime engine on a real artifact: exactness against itself, one by one, updated and afresh."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy_targets.catalog import make_quantizer, open_engine
from deploy_targets.engines.draws import pick_tokens
from deploy_targets.engines.onnxruntime import OnnxRuntimeEngine
from deploy_targets.errors import ArtifactError, EngineError, ProfileError, UsageError
from deploy_targets.profile import load_profile
from deploy_targets.quantizers.onnx_matmulnbits import OnnxMatMulNBitsQuantizer
from deploy_targets.types import WEIGHTS_FILE, Generation, Sampling, TokenSequence, WeightFile
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels
from tests.onnx_artifacts import builder_initializers, checkpoint, make_artifact, quantizer

VOCAB = 36
RAGGED = [[5, 6, 7], [9], [8, 8, 4, 30, 21, 12, 11], [5, 6, 7], [5, 6, 7], [20, 3], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]]
OPTIONS = {"max_model_len": 128, "num_threads": 2}


@pytest.fixture(scope="module")
def artifact(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tiny_models("qwen3", weight_std=0.1), tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def engine(artifact: Path) -> Iterator[OnnxRuntimeEngine]:
    engine = OnnxRuntimeEngine(artifact, OPTIONS, weight_version=3)
    yield engine
    engine.close()


def sequences(generations: Sequence[Generation]) -> list[TokenSequence]:
    return [g.sequence for g in generations]


def scaled_weights(tiny_models: TinyModels, path: Path, factor: float) -> WeightFile:
    """Another version: the same model with its MLPs scaled."""
    model_dir = tiny_models("qwen3", weight_std=0.1)
    weights = {name: tensor * factor if "down_proj" in name else tensor for name, tensor in checkpoint(model_dir).items()}
    write_weights(path, quantizer(model_dir).quantize(weights.items()), 200)
    return WeightFile(path, 4)


def test_the_shipped_profile_serves_through_the_catalog(artifact: Path, tiny_models: TinyModels) -> None:
    profile = load_profile("int4-onnx")
    assert isinstance(make_quantizer(profile, tiny_models("qwen3")), OnnxMatMulNBitsQuantizer)
    engine = open_engine(profile, artifact, weight_version=12)
    (generation,) = engine.generate([[5, 6]], Sampling(3))
    assert (len(generation.tokens), generation.weight_version) == (3, 12)
    engine.close()


@pytest.fixture(scope="module")
def as_built(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the builder leaves, its weights in a file of its own: the same model and scheme as `artifact`."""
    folder = tmp_path_factory.mktemp("built") / "onnx"
    builder_initializers(tiny_models("qwen3", weight_std=0.1), folder, "int4", "cpu", "accuracy_level=0", "block_size=32")
    return folder


def test_a_graph_with_its_own_weights_is_served_as_it_is(as_built: Path, engine: OnnxRuntimeEngine) -> None:
    built = OnnxRuntimeEngine(as_built, OPTIONS, weight_version=3)
    given = sequences(engine.generate(RAGGED, Sampling(12, seed=1)))
    for ours, theirs in zip(engine.score(given), built.score(given), strict=True):
        np.testing.assert_array_equal(ours.logps, theirs.logps)
    assert [g.tokens.tolist() for g in built.generate(RAGGED, Sampling(12, seed=1))] == [list(s.tokens[s.prompt_len :]) for s in given]
    with pytest.raises(EngineError, match="cannot be swapped"):
        built.update(WeightFile(as_built / "model.onnx.data", 4))
    built.close()


def test_a_graph_with_other_inputs_is_refused(as_built: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for file in as_built.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["batch_size", "sequence_length"]))
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(EngineError, match=r"takes other inputs than .*: position_ids"):
        OnnxRuntimeEngine(tmp_path, OPTIONS, weight_version=0)


def test_a_logit_that_is_not_finite_gives_nan_and_never_zero() -> None:
    logits = np.array([[0.0, np.nan, 1.0], [0.0, 1.0, 2.0], [np.inf, 0.0, 0.0]], np.float32)
    for temperature in (0.0, 1.0, 0.7):
        _, logps = pick_tokens(logits.copy(), temperature, np.full(3, 0.5))
        assert np.isnan(logps).tolist() == [True, False, True]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.3])
def test_generate_and_score_agree(engine: OnnxRuntimeEngine, temperature: float) -> None:
    generations = engine.generate(RAGGED * 3, Sampling(90, temperature, seed=1, stop_token_ids=(5, 17)))
    scores = engine.score(sequences(generations), temperature or 1.0)
    for generation, score in zip(generations, scores, strict=True):
        np.testing.assert_allclose(generation.logps, score.logps, atol=1e-3)
        assert (generation.weight_version, score.weight_version) == (3, 3)
        assert (generation.temperature, score.temperature) == (temperature, temperature or 1.0)
        if temperature == 0:
            np.testing.assert_array_equal(generation.tokens, score.greedy_tokens)


def test_a_ragged_batch_equals_one_by_one(engine: OnnxRuntimeEngine) -> None:
    together = engine.generate(RAGGED, Sampling(80, 0.0, stop_token_ids=(5,)))
    for prompt, generation in zip(RAGGED, together, strict=True):
        (alone,) = engine.generate([prompt], Sampling(80, 0.0, stop_token_ids=(5,)))
        np.testing.assert_array_equal(alone.tokens, generation.tokens)
        np.testing.assert_allclose(alone.logps, generation.logps, atol=1e-3)
    for one, score in zip(sequences(together), engine.score(sequences(together)), strict=True):
        np.testing.assert_allclose(engine.score([one])[0].logps, score.logps, atol=1e-3)


def test_small_batches_and_passes_change_nothing(artifact: Path, engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy_targets.engines.onnxruntime._TOKENS_PER_PASS", 9)
    small = OnnxRuntimeEngine(artifact, {**OPTIONS, "max_batch_size": 2, "num_threads": 1}, 3)
    sampling = Sampling(70, 1.0, seed=5, stop_token_ids=(5,))
    for a, b in zip(small.generate(RAGGED, sampling), engine.generate(RAGGED, sampling), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-3)
    small.close()


def test_stop_tokens_end_a_response_and_belong_to_it(engine: OnnxRuntimeEngine) -> None:
    stops = (4, 5, 6, 7)
    generations = engine.generate([[9]] * 64, Sampling(60, 1.0, seed=2, stop_token_ids=stops))
    assert "stop" in {g.finish_reason for g in generations}
    for g in generations:
        assert not np.isin(g.tokens[:-1], stops).any()
        assert (g.finish_reason == "stop") == (g.tokens[-1] in stops)
        assert g.finish_reason == "stop" or len(g.tokens) == 60
        assert (g.tokens.dtype, g.logps.dtype, len(g.logps)) == (np.int32, np.float32, len(g.tokens))
    assert len({len(g.tokens) for g in generations}) > 5


def test_one_token_responses_and_the_end_of_the_context(engine: OnnxRuntimeEngine) -> None:
    assert [len(g.tokens) for g in engine.generate(RAGGED, Sampling(1, 1.0))] == [1] * len(RAGGED)
    long = [[7] * 127, [7] * 100, [7]]
    generations = engine.generate(long, Sampling(500, 1.0, seed=1))
    assert [len(g.tokens) for g in generations] == [1, 28, 127]
    assert {g.finish_reason for g in generations} == {"length"}
    for generation, score in zip(generations, engine.score(sequences(generations)), strict=True):
        np.testing.assert_allclose(generation.logps, score.logps, atol=1e-3)


def test_the_same_call_gives_the_same_tokens_and_another_seed_others(engine: OnnxRuntimeEngine) -> None:
    first, again, other = (engine.generate(RAGGED * 4, Sampling(20, 1.0, seed=seed)) for seed in (7, 7, 8))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logps, b.logps)
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


def test_draws_of_one_prompt_differ(engine: OnnxRuntimeEngine) -> None:
    draws = engine.generate([RAGGED[2]] * 8, Sampling(12, 1.0, seed=0))
    assert len({tuple(g.tokens) for g in draws}) == 8


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_draws_follow_the_distribution_at_their_temperature(engine: OnnxRuntimeEngine, temperature: float) -> None:
    """Pearson's chi-square over 36 tokens: 35 degrees of freedom, 80 is the 1 - 2e-5 quantile; the wrong temperature exceeds it by far."""
    prompt, num_draws = (9, 10, 11), 8192
    draws = engine.generate([prompt] * num_draws, Sampling(1, temperature, seed=11))
    counts = np.bincount([g.tokens[0] for g in draws], minlength=VOCAB)

    def chi_square(at: float) -> float:
        scores = engine.score([TokenSequence((*prompt, token), len(prompt)) for token in range(VOCAB)], at)
        expected = num_draws * np.exp([float(score.logps[0]) for score in scores])
        assert expected.sum() == pytest.approx(num_draws, rel=1e-4)
        rare = expected < 5  # pooled, as the test asks
        cells = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
        return float(((cells[0] - cells[1]) ** 2 / np.maximum(cells[1], 1e-9)).sum())

    assert chi_square(temperature) < 80
    assert chi_square(temperature * 1.25) > 160


def test_an_update_equals_a_fresh_engine_and_back_restores_exactly(
    artifact: Path, tiny_models: TinyModels, tmp_path: Path, engine: OnnxRuntimeEngine
) -> None:
    new = scaled_weights(tiny_models, tmp_path / "new.safetensors", 1.5)
    probes = sequences(engine.generate(RAGGED, Sampling(20, 1.0)))
    before = engine.score(probes)
    assert [engine.update(new), engine.update(new)] == [4, 4]
    after = engine.score(probes)
    fresh_dir = tmp_path / "fresh"
    fresh_dir.mkdir()
    for file in artifact.iterdir():
        (fresh_dir / file.name).write_bytes((new.path if file.name == WEIGHTS_FILE else file).read_bytes())
    fresh = OnnxRuntimeEngine(fresh_dir, OPTIONS, 4)
    for a, b, c in zip(before, after, fresh.score(probes), strict=True):
        np.testing.assert_array_equal(b.logps, c.logps)
        assert np.abs(a.logps - b.logps).max() > 1e-3
        assert b.weight_version == 4
    fresh.close()
    engine.update(WeightFile(artifact / WEIGHTS_FILE, 3))
    for a, b in zip(before, engine.score(probes), strict=True):
        np.testing.assert_array_equal(a.logps, b.logps)


def test_the_served_file_may_be_replaced_while_it_is_mapped(tiny_models: TinyModels, tmp_path: Path, engine: OnnxRuntimeEngine) -> None:
    """A publish writes a new file and renames it over the one that is served."""
    probes = sequences(engine.generate(RAGGED, Sampling(10, 1.0)))
    old = engine.weight_version
    before = engine.score(probes)
    served = scaled_weights(tiny_models, tmp_path / "served.safetensors", 1.0)
    engine.update(served)
    scaled_weights(tiny_models, served.path, 2.0)
    for a, b in zip(before, engine.score(probes), strict=True):
        np.testing.assert_array_equal(a.logps, b.logps)
    engine.update(WeightFile(served.path, old))
    assert any(np.abs(a.logps - b.logps).max() > 1e-3 for a, b in zip(before, engine.score(probes), strict=True))
    engine.update(scaled_weights(tiny_models, tmp_path / "restore.safetensors", 1.0))
    engine.weight_version = old


def broken_files(tiny_models: TinyModels, folder: Path) -> Iterator[tuple[Path, str]]:
    """Weights files that must not be served, and what the error must say."""
    model_dir = tiny_models("qwen3", weight_std=0.1)
    tensors = dict(quantizer(model_dir).quantize(checkpoint(model_dir).items()))
    name = "model.layers.1.mlp.up_proj.MatMul.weight_scales"
    others: dict[str, dict[str, torch.Tensor]] = {
        "missing": {n: t for n, t in tensors.items() if n != name},
        "unknown to the model": {**tensors, "surplus": torch.zeros(3)},
        r"\[256, 2\]": {**tensors, name: tensors[name][:, :2]},
        "F16": {**tensors, name: tensors[name].half()},
    }
    for i, (reason, content) in enumerate(others.items()):
        path = folder / f"{i}.safetensors"
        write_weights(path, content.items(), 200)
        yield path, ("surplus: " if reason == "unknown to the model" else rf"{name}: .*") + reason
    truncated = folder / "truncated.safetensors"
    truncated.write_bytes((folder / "0.safetensors").read_bytes()[:100])
    yield truncated, "cannot be read as a safetensors file"
    short = folder / "short.safetensors"
    write_weights(short, tensors.items(), 200)
    short.write_bytes(short.read_bytes()[:-1000])
    yield short, "truncated"
    yield folder / "absent.safetensors", "cannot be read as a safetensors file"


def test_a_bad_weights_file_is_refused_and_the_old_version_stays(
    tiny_models: TinyModels, tmp_path: Path, engine: OnnxRuntimeEngine
) -> None:
    probes = sequences(engine.generate(RAGGED, Sampling(5, 1.0)))
    before, version = engine.score(probes), engine.weight_version
    for path, reason in broken_files(tiny_models, tmp_path):
        with pytest.raises(EngineError, match=reason):
            engine.update(WeightFile(path, 99))
    assert engine.weight_version == version
    for a, b in zip(before, engine.score(probes), strict=True):
        np.testing.assert_array_equal(a.logps, b.logps)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_len": 5}, "max_len: unknown key"),
        ({"num_threads": 0}, "num_threads"),
        ({"execution_provider": "NobodyExecutionProvider"}, "CPUExecutionProvider"),
    ],
)
def test_bad_options_are_refused(artifact: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProfileError, match=reason):
        OnnxRuntimeEngine(artifact, options, 0)


def test_a_graph_that_ends_earlier_sets_the_limit(artifact: Path) -> None:
    """512 positions; the prompt leaves room for two tokens."""
    engine = OnnxRuntimeEngine(artifact, {**OPTIONS, "max_model_len": 100_000}, 0)
    (generation,) = engine.generate([[5] * 510], Sampling(4))
    assert (len(generation.tokens), generation.finish_reason) == (2, "length")
    with pytest.raises(UsageError, match="513 tokens > max_model_len 512"):
        engine.score([TokenSequence((5,) * 513, 1)])
    engine.close()


@pytest.mark.parametrize("prompt", [[], [5] * 128, [VOCAB], [-1]])
def test_bad_prompts_are_refused_before_anything_runs(engine: OnnxRuntimeEngine, prompt: list[int]) -> None:
    with pytest.raises(UsageError, match="prompt 1"):
        engine.generate([[5], prompt], Sampling(4))


def test_a_folder_that_is_no_artifact_is_refused(tmp_path: Path, artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        OnnxRuntimeEngine(tmp_path, {}, 0)
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="genai"):
        OnnxRuntimeEngine(tmp_path, {}, 0)


def test_nothing_to_do_and_closing_twice(artifact: Path) -> None:
    engine = OnnxRuntimeEngine(artifact, OPTIONS, 0)
    assert engine.generate([], Sampling(4)) == []
    assert engine.score([]) == []
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate([[5]], Sampling(4))
    with pytest.raises(EngineError, match="closed"):
        engine.update(WeightFile(artifact / WEIGHTS_FILE, 1))


def test_the_engine_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, deploy_targets.engines.onnxruntime; print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
