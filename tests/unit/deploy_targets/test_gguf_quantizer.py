"""The GGUF quantizer, held byte for byte against llama.cpp's own `llama_model_quantize`, and its files read by llama.cpp."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deploy_targets.errors import PreflightError, WeightsError
from deploy_targets.gguf_file import GGUF_FILE, read_gguf
from deploy_targets.profile import SchemeSpec
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import weights_name, write_version
from tests.conftest import TinyModels

llama_cpp = pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")

from deploy_targets.quantizers import ggml  # noqa: E402
from deploy_targets.quantizers.gguf import GgufQuantizer  # noqa: E402
from deploy_targets.quantizers.gguf_plan import SCHEMES  # noqa: E402

BITS = {
    "Q4_K_M": (4, 32, False),
    "Q3_K_S": (3, 16, True),
    "Q2_K": (2, 16, False),
    "Q4_0": (4, 32, True),
    "Q8_0": (8, 32, True),
    "F16": (16, None, True),
    "F32": (32, None, True),
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "whole-blocks": ("qwen3", {"hidden_size": 256, "head_dim": 64, "num_layers": 3}),
    "fallbacks": ("qwen2", {"tied": True}),
    "interleaved-heads": ("llama", {"hidden_size": 256, "head_dim": 64, "num_layers": 9}),
    "no-whole-blocks": ("qwen3", {"hidden_size": 48, "intermediate_size": 80, "head_dim": 16, "tied": True}),
    "counts-as-70b": ("llama", {"hidden_size": 32, "intermediate_size": 32, "num_layers": 80, "num_heads": 2, "num_kv_heads": 1,
                                "head_dim": 16, "extra_config": {"rope_parameters": LLAMA3}}),
}  # fmt: skip


def scheme(name: str) -> SchemeSpec:
    bits, group_size, symmetric = BITS[name]
    return SchemeSpec(quantizer="gguf", name=name, bits=bits, group_size=group_size, symmetric=symmetric)


def quantizer(model_dir: Path, name: str) -> GgufQuantizer:
    return GgufQuantizer(scheme(name), json.loads((model_dir / "config.json").read_text("utf-8")))


def write(model_dir: Path, name: str, path: Path) -> Path:
    write_version(path, quantizer(model_dir, name), load_file(model_dir / WEIGHTS_FILE).items(), model_dir, 0)
    return path


def tensor_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = path.read_bytes()
    return {name: (kind, shape, data[start : start + n]) for name, (kind, shape, start, n) in read_gguf(path).tensors.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["Q4_K_M", "Q3_K_S", "Q2_K", "Q4_0", "Q8_0"])
def test_the_file_is_what_llama_cpp_quantizes_the_model_to(name: str, model: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    family, options = MODELS[model]
    model_dir = tiny_models(family, **options)  # type: ignore[arg-type]
    source = write(model_dir, "F32", tmp_path / "source.gguf")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(SCHEMES[name][0]), 1
    theirs, ours = tmp_path / "theirs.gguf", write(model_dir, name, tmp_path / "ours.gguf")
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), ctypes.byref(parameters)) == 0
    expected, found = tensor_bytes(theirs), tensor_bytes(ours)
    assert {key: value[:2] for key, value in found.items()} == {key: value[:2] for key, value in expected.items()}
    assert [key for key in expected if found[key][2] != expected[key][2]] == []
    assert read_gguf(ours).metadata == read_gguf(theirs).metadata


def test_the_mix_of_types_is_that_of_each_model(tiny_models: TinyModels) -> None:
    def types(model: str, name: str) -> set[str]:
        family, options = MODELS[model]
        made = quantizer(tiny_models(family, **options), name)  # type: ignore[arg-type]
        return {made.stored_type(key) for key in load_file(tiny_models(family, **options) / WEIGHTS_FILE)}  # type: ignore[arg-type]

    assert types("whole-blocks", "Q4_K_M") == {"F32", "Q4_K", "Q6_K"}
    assert types("fallbacks", "Q4_K_M") == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert types("no-whole-blocks", "Q4_K_M") == {"F32", "Q5_0", "F16"}
    assert types("counts-as-70b", "Q4_K_M") == {"F32", "Q5_0", "Q5_1", "Q8_0"}
    assert types("whole-blocks", "Q4_0") == {"F32", "Q4_0", "Q6_K"}
    assert types("whole-blocks", "Q8_0") == {"F32", "Q8_0"}


@pytest.mark.parametrize("name", ["Q4_K_M", "Q3_K_S", "Q2_K", "Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("model", ["whole-blocks", "fallbacks", "no-whole-blocks"])
def test_dequantized_values_are_those_of_the_file(name: str, model: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    family, options = MODELS[model]
    model_dir = tiny_models(family, **options)  # type: ignore[arg-type]
    made = quantizer(model_dir, name)
    reader = gguf.GGUFReader(write(model_dir, name, tmp_path / "model.gguf"))
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    pairs = {"model.embed_tokens.weight": "token_embd.weight", "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight"}
    for key, weight in load_file(model_dir / WEIGHTS_FILE).items():
        values = made.dequantized(key, weight.float())
        assert values.shape == weight.shape
        if key in pairs:
            np.testing.assert_array_equal(values.numpy(), stored[pairs[key]])
        if made.quantizes(key):
            error = float((values - weight.float()).norm() / weight.float().norm())
            # bf16 weights of this size are float16 too, but for the bits of the smallest.
            assert error < 1e-5 if made.stored_type(key) == "F16" else 0.001 < error < (0.4 if name in ("Q3_K_S", "Q2_K") else 0.12)
        else:
            assert values.equal(weight.float())
        assert made.dequantized(key, weight).dtype == weight.dtype == torch.bfloat16


def test_a_changed_weight_is_encoded_again_and_the_old_one_gives_its_old_bytes(tiny_models: TinyModels) -> None:
    made, name = quantizer(tiny_models("qwen3"), "Q4_K_M"), "model.layers.0.mlp.up_proj.weight"
    weight = load_file(tiny_models("qwen3") / WEIGHTS_FILE)[name]
    first = made.dequantized(name, weight)
    weight[3, 5] += 0.5
    assert not made.dequantized(name, weight).equal(first)
    weight[3, 5] -= 0.5
    assert made.dequantized(name, weight).equal(first)


def test_threads_change_no_byte() -> None:
    weight = np.random.default_rng(0).normal(size=(3000, 256)).astype(np.float32)
    one, four = (ggml.encode("w", weight, gguf.GGMLQuantizationType.Q4_K, num_threads) for num_threads in (1, 4))
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", ["Q4_K_M", "F16"])
def test_weights_that_cannot_be_stored_are_not_written(name: str, value: float, tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("qwen3", hidden_size=256)
    tensors = load_file(model_dir / WEIGHTS_FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][7, 7] = value
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        write_version(tmp_path / GGUF_FILE, quantizer(model_dir, name), tensors.items(), model_dir, 0)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_are_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("qwen3")
    made, tensors = quantizer(model_dir, "Q8_0"), load_file(model_dir / WEIGHTS_FILE)
    assert weights_name(made) == GGUF_FILE
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert made.offenders(shapes) == []
    lost = shapes.pop("lm_head.weight")
    lines = made.offenders({**shapes, "model.norm.weight": (7,), "extra": lost})
    assert len(lines) == 3
    for line, fragment in zip(lines, ("model.norm.weight: shape [7]", "extra: a GGUF file", "lm_head.weight: is missing"), strict=True):
        assert line.startswith(fragment)
    del tensors["lm_head.weight"]
    with pytest.raises(WeightsError, match=r"never arrived: lm_head\.weight"):
        made.write(tmp_path / GGUF_FILE, made.quantize(tensors.items()), model_dir)
    with pytest.raises(WeightsError, match="no such tensor"):
        list(made.quantize([("extra", torch.zeros(2))]))


@pytest.mark.parametrize(
    ("changes", "config", "fragment"),
    [
        ({"name": "Q3_K"}, {}, "scheme.name 'Q3_K'"),
        ({"bits": 8}, {}, "(bits, group_size, symmetric)"),
        ({"ignore": ("lm_head",)}, {}, "leave `ignore` out"),
        ({}, {"model_type": "gemma"}, "model_type 'gemma'"),
        ({}, {"use_sliding_window": True}, "use_sliding_window"),
        ({}, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary embeddings of type 'yarn'"),
        ({}, {"rope_parameters": LLAMA3}, "rotary embeddings of type 'llama3'"),
        ({}, {"hidden_size": 0}, "hidden_size must be a positive number"),
    ],
)
def test_what_no_gguf_target_has_is_refused(
    changes: dict[str, object], config: dict[str, object], fragment: str, tiny_models: TinyModels
) -> None:
    known = json.loads((tiny_models("qwen3") / "config.json").read_text("utf-8"))
    with pytest.raises(PreflightError) as raised:
        GgufQuantizer(scheme("Q4_K_M").model_copy(update=changes), {**known, **config})
    assert fragment in str(raised.value)
