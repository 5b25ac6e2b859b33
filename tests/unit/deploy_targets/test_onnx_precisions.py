"""Every precision of the ONNX targets: its artifact against transformers, onnxruntime-genai and the shipped profiles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy_targets.catalog import make_quantizer
from deploy_targets.engines.onnx_decode import CacheSlots
from deploy_targets.engines.onnxruntime import OnnxRuntimeEngine
from deploy_targets.engines.sampling_loop import batches, sample_batch
from deploy_targets.errors import ProfileError
from deploy_targets.hardware import find_gpus
from deploy_targets.preflight import check_target
from deploy_targets.profile import load_profile, parse_profile, profile_text
from deploy_targets.types import Sampling, TokenSequence
from tests.conftest import TinyModels
from tests.models import EOS_ID
from tests.onnx_artifacts import checkpoint, make_artifact, quantizer

VOCAB = 36
OPTIONS = {"max_model_len": 128, "num_threads": 2}
PROMPT = list(range(9, 20))
EXACT, HALF = 1e-3, 0.03
"""Nats: float32 against float32 in another order; float16 logits of up to 16, which are 0.008 apart."""


@pytest.mark.parametrize(
    ("family", "tied", "options", "tolerance"),
    [
        pytest.param("qwen3", False, {}, EXACT, id="int4-qwen3"),
        pytest.param("qwen2", True, {}, EXACT, id="int4-qwen2-tied"),
        pytest.param("llama", False, {}, EXACT, id="int4-llama"),
        pytest.param("llama", False, {"name": "W8A16"}, EXACT, id="int8-llama"),
        pytest.param("qwen3", True, {"name": "W8A16"}, EXACT, id="int8-qwen3-tied"),
        pytest.param("llama", False, {"name": "FP32"}, EXACT, id="fp32-llama"),
        pytest.param("llama", False, {"name": "FP16"}, HALF, id="fp16-llama"),
        pytest.param("qwen3", True, {"provider": "cuda"}, HALF, id="int4-cuda-qwen3-tied"),
    ],
)
def test_scores_equal_transformers_on_the_dequantized_weights(
    tiny_models: TinyModels, tmp_path: Path, family: str, tied: bool, options: dict[str, Any], tolerance: float
) -> None:
    """Biases, packed q/k/v, norms, rotary caches, tied embeddings and the scales of every matrix: one wrong and this is off by far."""
    model_dir = tiny_models(family, tied=tied, weight_std=0.1)
    engine = OnnxRuntimeEngine(make_artifact(model_dir, tmp_path, **options), OPTIONS, 0)
    maker = quantizer(model_dir, **options)
    state = {name: maker.dequantized(name, tensor.float()) for name, tensor in checkpoint(model_dir).items()}
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    reference.load_state_dict(state, strict=False)
    tokens = tuple(np.random.default_rng(0).integers(3, VOCAB, 40).tolist())
    with torch.no_grad():
        logps = reference(torch.tensor([tokens])).logits.log_softmax(-1)[0, 3:-1]
    wanted = logps.gather(1, torch.tensor(tokens[4:]).unsqueeze(1)).squeeze(1)
    (scores,) = engine.score([TokenSequence(tokens, 4)])
    np.testing.assert_allclose(scores.logps, wanted.numpy(), atol=tolerance)
    # Up to a tie within the tolerance, what the engine calls most probable is.
    greedy = logps.gather(1, torch.from_numpy(scores.greedy_tokens).long().unsqueeze(1)).squeeze(1)
    assert (logps.amax(-1) - greedy <= 2 * tolerance).all()
    engine.close()


@pytest.mark.parametrize("options", [{}, {"name": "W8A16"}, {"name": "FP32"}, {"name": "FP16"}], ids=lambda o: o.get("name", "W4A16"))
def test_the_artifact_runs_unchanged_in_onnxruntime_genai(tiny_models: TinyModels, tmp_path: Path, options: dict[str, str]) -> None:
    """In a fresh process, as on the serving machine."""
    script = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=30, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(json.loads(sys.argv[2]))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(t) for t in generator.get_sequence(0)]))
"""
    artifact = make_artifact(tiny_models("qwen3", weight_std=0.1), tmp_path, **options)
    engine = OnnxRuntimeEngine(artifact, OPTIONS, 0)
    done = subprocess.run([sys.executable, "-c", script, str(artifact), str(PROMPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (generation,) = engine.generate([PROMPT], Sampling(max_tokens=30 - len(PROMPT), temperature=0, stop_token_ids=(EOS_ID,)))
    tokens = [token for token in generation.tokens.tolist() if token != EOS_ID]  # genai leaves the stop token out
    assert len(tokens) > 8
    assert str(PROMPT + tokens) == done.stdout.strip()
    engine.close()


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_rounded_to_int8_stay_close(tiny_models: TinyModels, tmp_path: Path, bits: int) -> None:
    """A8 is the builder's default: other numbers than A16, near them, from the same bytes of weights."""
    model_dir = tiny_models("qwen3", weight_std=0.1)
    exact, rounded = (
        OnnxRuntimeEngine(make_artifact(model_dir, tmp_path / name, name=name), OPTIONS, 3) for name in (f"W{bits}A16", f"W{bits}A8")
    )
    probes = [g.sequence for g in exact.generate([PROMPT, PROMPT[:3]] * 3, Sampling(40, 1.0))]
    gaps = np.concatenate([np.abs(a.logps - b.logps) for a, b in zip(exact.score(probes), rounded.score(probes), strict=True)])
    assert 1e-4 < gaps.mean() < 0.2
    exact.close()
    rounded.close()


@pytest.mark.parametrize("options", [{}, {"provider": "cuda"}], ids=["float32", "float16"])
def test_a_cache_that_is_copied_at_every_step_gives_the_same_tokens(
    tiny_models: TinyModels, tmp_path: Path, options: dict[str, str]
) -> None:
    """What a device does, whose memory the cache cannot share: rows end at different times, and the cache has to be widened."""
    engine = OnnxRuntimeEngine(make_artifact(tiny_models("llama", weight_std=0.1), tmp_path, **options), OPTIONS, 3)
    prompts = [(5, 6, 7), (9,), (8, 8, 4, 30, 21, 12, 11), (20, 3), (20, 3)]
    sampling = Sampling(90, 1.0, stop_token_ids=(5, 17))
    (batch,) = batches(prompts, sampling, max_batch_size=8, num_parallel=1)
    bound, copied = (
        sample_batch(CacheSlots(engine.graph, engine._session, 97, 2048, in_place=in_place), batch, sampling, 128)
        for in_place in (True, False)
    )
    np.testing.assert_array_equal(bound.counts, copied.counts)
    assert len(set(bound.counts)) > 2
    np.testing.assert_array_equal(bound.tokens, copied.tokens)
    np.testing.assert_allclose(bound.logps, copied.logps, atol=1e-6)
    engine.close()


def test_the_folder_names_the_provider_that_it_is_served_by(tiny_models: TinyModels, tmp_path: Path) -> None:
    """The graph of FP16 is the one for CUDA, but its profile serves it on the CPU."""
    model_dir = tiny_models("llama")
    for options, named in (({"name": "FP16"}, []), ({"name": "FP16", "provider": "cuda"}, ["cuda"])):
        folder = make_artifact(model_dir, tmp_path / str(len(named)), **options)
        config = json.loads((folder / "genai_config.json").read_text())
        assert [name for entry in config["model"]["decoder"]["session_options"]["provider_options"] for name in entry] == named
        inputs = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.input
        past = {value.name: value.type.tensor_type.elem_type for value in inputs}["past_key_values.0.key"]
        assert past == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("name", ["int4-onnx", "int8-onnx", "fp32-onnx", "fp16-onnx", "int4-onnx-cuda"])
def test_the_shipped_profiles_fit_a_model(tiny_models: TinyModels, name: str) -> None:
    model_dir = tiny_models("qwen2", tied=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in checkpoint(model_dir).items()}
    assert make_quantizer(load_profile(name), model_dir).offenders(shapes) == []


@pytest.mark.skipif(bool(find_gpus()), reason="needs a machine without a GPU")
def test_cuda_is_refused_where_it_is_not_with_every_reason() -> None:
    reasons = "\n".join(check_target(load_profile("int4-onnx-cuda")))
    assert "it needs a CUDA GPU" in reasons
    assert "'CUDAExecutionProvider' is not in this build of onnxruntime" in reasons
    assert "pip install 'hetero-rl[onnx-gpu]'" in reasons
    for name in ("int4-onnx", "int8-onnx", "fp32-onnx", "fp16-onnx"):
        assert check_target(load_profile(name)) == []


def test_options_that_the_engine_would_refuse_are_refused_before() -> None:
    profile = load_profile("int8-onnx")
    engine = profile.engine.model_copy(update={"options": {"threads": 3, "execution_provider": "NobodyExecutionProvider"}})
    (reason,) = check_target(profile.model_copy(update={"engine": engine}))
    assert reason.startswith("engine.options: threads: unknown key; onnxruntime knows execution_provider, max_batch_size")
    engine = profile.engine.model_copy(update={"options": {"execution_provider": "NobodyExecutionProvider"}})
    (reason,) = check_target(profile.model_copy(update={"engine": engine}))
    assert "'NobodyExecutionProvider' is not in this build" in reason


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("int4-onnx-cuda", '\nprovider = "cuda"', "", "set it to 'cuda'"),
        ("int4-onnx", "symmetric = true", 'symmetric = true\nprovider = "cuda"', "leave it out"),
        ("int4-vllm", "[scheme]", '[scheme]\nprovider = "cpu"', "provider has no effect with quantizer 'compressed-tensors'"),
    ],
)
def test_a_graph_for_another_provider_than_the_engines_is_refused(name: str, old: str, new: str, reason: str) -> None:
    with pytest.raises(ProfileError, match=reason):
        parse_profile(profile_text(name).replace(old, new, 1), "mine.toml")
