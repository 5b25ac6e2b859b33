"""Weights read back as numbers from every format, and what a fingerprint says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deploy_targets.catalog import make_quantizer
from deploy_targets.errors import ArtifactError
from deploy_targets.fingerprint import FINGERPRINT_FILE, Sketch, read_fingerprint, write_fingerprint
from deploy_targets.manifest import SamplingRecord
from deploy_targets.onnx_file import graph_settings
from deploy_targets.profile import load_profile
from deploy_targets.protocols import CalibratedQuantizer
from deploy_targets.stored_weights import read_stored
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import weights_name, write_version
from tests.conftest import TinyModels
from tests.contract.targets import model_options, uneven_grams

SAMPLING = SamplingRecord(max_tokens=8, stop_token_ids=(2,))
FORMATS = [
    ("int4-onnx", "qwen3", "U4 in groups of 32"),
    ("int8-onnx", "qwen2", "U8 in groups of 32"),
    ("fp16-onnx", "llama", "F16"),
    ("int4-vllm", "qwen2", "U4 in groups of 32"),
    ("int4-gptq-vllm", "qwen3", "U4 in groups of 32"),
    ("fp8-vllm", "qwen3", "F8_E4M3 with a scale per row"),
    ("fp8-block-vllm", "qwen3", "F8_E4M3 with a scale per block of 128 x 128"),
    ("int8-vllm", "llama", "I8 with a scale per row"),
    ("bf16-vllm", "qwen3_moe", "BF16"),
    ("nf4-transformers", "qwen3", "NF4 in blocks of 64"),
    ("int8-transformers", "qwen2", "I8 with a scale per row"),
    ("q4_0-llamacpp", "llama", "Q4_0"),
    ("q4_k_m-llamacpp", "qwen3", "Q4_K"),
]


@pytest.mark.parametrize(("name", "family", "storage"), FORMATS)
def test_stored_weights_are_what_the_quantizer_says(name: str, family: Any, storage: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    profile, model_dir = load_profile(name), tiny_models(family, **model_options(name))
    tensors, config = load_file(model_dir / WEIGHTS_FILE), json.loads((model_dir / "config.json").read_text())
    quantizer = make_quantizer(profile, model_dir)
    if isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_calibration:
        quantizer.calibrate(tensors.items(), uneven_grams(quantizer, tensors))
    write_version(tmp_path / weights_name(quantizer), quantizer, tensors.items(), model_dir, 4 * len(tensors) + 16)
    if "onnx" in name:
        (tmp_path / "model.onnx").touch()
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    stored = read_stored(tmp_path, config, shapes, profile.scheme.name)
    assert stored.unknown == ()
    assert set(stored.tensors) == set(shapes)
    assert stored.tensors["model.layers.0.self_attn.q_proj.weight"].storage == storage
    for key, tensor in tensors.items():
        found, expected = stored.tensors[key].whole(), quantizer.dequantized(key, tensor.float()).float().numpy()
        assert found.shape == expected.shape
        # Some of these are rounded to bf16 by `dequantized`.
        assert np.linalg.norm(found - expected) <= 3e-3 * np.linalg.norm(expected), key


def test_awq_is_read_in_its_order_of_nibbles(tiny_models: TinyModels, tmp_path: Path) -> None:
    """What AWQ folds into other layers is in the stored weights, not in `dequantized`: uncalibrated, nothing is folded."""
    model_dir = tiny_models("qwen3")
    quantizer = make_quantizer(load_profile("int4-awq-vllm"), model_dir)
    tensors, config = load_file(model_dir / WEIGHTS_FILE), json.loads((model_dir / "config.json").read_text())
    write_version(tmp_path / WEIGHTS_FILE, quantizer, tensors.items(), model_dir, 200)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    stored = read_stored(tmp_path, config, {}, "W4A16")
    key = "model.layers.1.mlp.down_proj.weight"
    expected = quantizer.dequantized(key, tensors[key].float()).float().numpy()
    assert np.abs(stored.tensors[key].whole() - expected).max() < 2e-3


def test_a_sketch_estimates_distances() -> None:
    generator = np.random.default_rng(0)
    one = generator.standard_normal((300, 70), dtype=np.float32)
    ratios = []
    for index in range(200):
        other = one + 0.1 * generator.standard_normal(one.shape, dtype=np.float32)
        name = f"tensor {index}"
        ratios.append(Sketch.of(name, [other]).distance(Sketch.of(name, [one]).text) / np.linalg.norm(other - one))
    assert np.mean(np.square(ratios)) == pytest.approx(1, abs=0.06)
    assert np.std(ratios) < 0.17
    one[3, 5] = np.nan
    assert Sketch.of("tensor", [one]).num_nonfinite == 1


def test_a_fingerprint_is_read_back_and_says_what_is_missing(tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("qwen3")
    profile, tensors = load_profile("bf16-vllm"), load_file(model_dir / WEIGHTS_FILE)
    config = json.loads((model_dir / "config.json").read_text())
    quantizer = make_quantizer(profile, model_dir)
    write_version(tmp_path / WEIGHTS_FILE, quantizer, tensors.items(), model_dir, 200)
    quantizer.scaffold(model_dir, tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert read_fingerprint(tmp_path) is None
    written = write_fingerprint(tmp_path, profile, SAMPLING, 1.0, config, shapes, numbers(tensors))
    assert read_fingerprint(tmp_path) == written
    assert all(mark.error == 0 for mark in written.tensors.values())
    assert written.settings["config.json: rope_parameters.rope_theta"] == 10000
    assert written.settings["sampling: stop_token_ids"] == [2]
    with pytest.raises(ArtifactError, match="no place, or one of another shape, for extra"):
        write_fingerprint(tmp_path, profile, SAMPLING, 1.0, config, shapes, [("extra.weight", np.ones((2, 2), np.float32))])
    (tmp_path / FINGERPRINT_FILE).write_text('{"format": "fingerprint-1", "tensors": 3}')
    with pytest.raises(ArtifactError, match="no readable fingerprint"):
        read_fingerprint(tmp_path)


def numbers(tensors: dict[str, torch.Tensor]) -> Any:
    return ((name, tensor.float().numpy()) for name, tensor in tensors.items())


def test_a_graph_is_read_without_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("MatMulNBits", ["a"], ["b"], domain="com.microsoft", bits=4, block_size=64, K=128)
    angles = np.arange(8)[:, None] * 5e5 ** (-np.arange(16) / 16)
    table = onnx.numpy_helper.from_array(np.cos(angles).astype(np.float32), "cos_cache")
    graph = onnx.helper.make_graph([node], "g", [], [], [table])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    assert graph_settings(path) == {"bits": 4, "block_size": 64, "rope_theta": 5e5}
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="no readable ONNX graph"):
        graph_settings(path)
