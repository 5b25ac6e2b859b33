"""The ONNX quantizers against the model builder that everyone deploys with, and against ONNX Runtime's own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from deploy_targets.errors import EngineError, PreflightError, WeightsError
from deploy_targets.profile import SchemeSpec
from deploy_targets.quantizers.onnx_blocks import dequantize_blocks, pack_blocks, quantize_blocks
from deploy_targets.quantizers.onnx_float import OnnxFloatQuantizer
from deploy_targets.quantizers.onnx_matmulnbits import OnnxMatMulNBitsQuantizer
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import tensor_layout, write_weights
from tests.conftest import TinyModels
from tests.onnx_artifacts import builder_initializers, checkpoint, quantizer, scheme

HEAD_NODES = "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"
IGNORED = ("lm_head", r"re:.*layers\.0\.self_attn\.[qkv]_proj", "model.layers.1.mlp.down_proj")
IGNORED_NODES = HEAD_NODES + ",/model/layers.0/attn/qkv_proj/MatMul,/model/layers.1/mlp/down_proj/MatMul"
TIED = {"tied": True}
VARIANTS: list[Any] = [
    pytest.param("qwen3", {}, {}, ["int4", "cpu", "block_size=32"], id="int4-qwen3"),
    pytest.param("qwen3", TIED, {"group_size": 64}, ["int4", "cpu", "block_size=64"], id="int4-qwen3-tied"),
    pytest.param("qwen2", {}, {}, ["int4", "cpu", "block_size=32"], id="int4-qwen2-biases"),
    pytest.param("llama", {}, {"group_size": 128}, ["int4", "cpu", "block_size=128"], id="int4-llama"),
    pytest.param("qwen3", TIED, {"ignore": IGNORED}, ["int4", "cpu", IGNORED_NODES], id="int4-ignored-modules"),
    pytest.param("qwen3", {}, {"name": "W8A16"}, ["int8", "cpu", "block_size=32"], id="int8-qwen3"),
    pytest.param("qwen2", TIED, {"name": "W8A16", "group_size": 16}, ["int8", "cpu", "block_size=16", HEAD_NODES], id="int8-qwen2-tied"),
    pytest.param("qwen2", TIED, {"name": "FP32"}, ["fp32", "cpu"], id="fp32-qwen2-tied"),
    pytest.param("llama", {}, {"name": "FP16"}, ["fp16", "cuda"], id="fp16-llama"),
    pytest.param("qwen2", TIED, {"name": "FP16"}, ["fp16", "cuda"], id="fp16-qwen2-tied"),
    pytest.param("qwen3", TIED, {"provider": "cuda"}, ["int4", "cuda", "block_size=32"], id="int4-cuda-qwen3-tied"),
    pytest.param("qwen2", {}, {"name": "W8A16", "provider": "cuda"}, ["int8", "cuda", "block_size=32"], id="int8-cuda-qwen2"),
]


@pytest.mark.parametrize(("family", "model_options", "scheme_options", "builder_options"), VARIANTS)
def test_initializers_are_the_builders_bit_for_bit(
    tiny_models: TinyModels,
    tmp_path: Path,
    family: str,
    model_options: dict[str, Any],
    scheme_options: dict[str, Any],
    builder_options: list[str],
) -> None:
    model_dir = tiny_models(family, **model_options)
    precision, provider, *extra = builder_options
    wanted = builder_initializers(model_dir, tmp_path / "built", precision, provider, *extra)
    found = {name: tensor.numpy() for name, tensor in quantizer(model_dir, **scheme_options).quantize(checkpoint(model_dir).items())}
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("rounded_to", "stored"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.bfloat16, torch.float16)]
)
def test_codes_and_scales_equal_mlas(bits: int, group_size: int, rounded_to: torch.dtype, stored: torch.dtype) -> None:
    """Ties, zeros, constants, blocks of one sign, tiny and subnormal magnitudes included."""
    from onnxruntime.capi import _pybind_state as mlas

    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(group_size)) * 0.05
    weight[0], weight[1], weight[2], weight[3] = 0, 1, -1, weight[3].abs()
    weight[4, ::2], weight[4, 1::2] = 1, -1
    weight[5] *= 1e-30 if stored == torch.float32 else 1e-5
    weight[6] = torch.arange(512) % 17 - 8
    weight[7] = torch.arange(512) % 257 - 128
    weight[8] *= 1e-4
    weight = weight.to(rounded_to).to(stored)
    num_groups = 512 // group_size
    packed = np.zeros((64, num_groups, group_size * bits // 8), np.uint8)
    scales = np.zeros((64, num_groups), weight.numpy().dtype)
    zeros = np.zeros((64, (num_groups * bits + 7) // 8), np.uint8)
    quantize = mlas.quantize_matmul_4bits if bits == 4 else mlas.quantize_matmul_8bits
    quantize(packed, np.ascontiguousarray(weight.numpy().T), scales, zeros, group_size, 64, 512, True)
    codes, own_scales = quantize_blocks(weight, group_size, bits)
    assert own_scales.numpy().tobytes() == scales.tobytes()
    assert pack_blocks(codes, bits).numpy().tobytes() == packed.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_is_what_the_runtime_computes_with(bits: int) -> None:
    """ONNX Runtime itself multiplies the bytes with the unit matrix."""
    from onnx import TensorProto, helper

    codes, scales = quantize_blocks(torch.randn(48, 128, generator=torch.Generator().manual_seed(1)), 32, bits)
    attributes = {"bits": bits, "block_size": 32, "K": 128, "N": 48, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["in", "codes", "scales"], ["out"], domain="com.microsoft", **attributes)
    real, byte = TensorProto.FLOAT, TensorProto.UINT8
    inputs = [("in", real, [128, 128]), ("codes", byte, [48, 4, 4 * bits]), ("scales", real, [48, 4])]
    outputs = [helper.make_tensor_value_info("out", real, [128, 48])]
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info(*i) for i in inputs], outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    feed = {"in": np.eye(128, dtype=np.float32), "codes": pack_blocks(codes, bits).numpy(), "scales": scales.numpy()}
    (unpacked,) = session.run(None, feed)
    np.testing.assert_array_equal(dequantize_blocks(codes, scales, bits, torch.float32).numpy(), unpacked.T)


@pytest.mark.parametrize(("options", "steps"), [({}, 8), ({"name": "W8A16"}, 128), ({"provider": "cuda"}, 8)])
def test_dequantized_keeps_shape_and_dtype_and_spares_what_is_not_quantized(
    tiny_models: TinyModels, options: dict[str, str], steps: int
) -> None:
    model_dir = tiny_models("qwen3")
    weights, maker = checkpoint(model_dir), quantizer(model_dir, **options)
    linear = weights["model.layers.0.mlp.up_proj.weight"].float()
    rounded = maker.dequantized("model.layers.0.mlp.up_proj.weight", linear)
    assert (rounded.dtype, rounded.shape) == (linear.dtype, linear.shape)
    assert not torch.equal(rounded, linear)
    step = linear.abs().reshape(len(linear), -1, 32).amax(-1, keepdim=True) / steps
    # Half a step, a whole one where the code for the opposite extreme is missing, and float16's rounding of the scale.
    assert ((rounded - linear).abs().reshape(len(linear), -1, 32) <= 1.05 * step).all()
    assert maker.dequantized("model.layers.0.mlp.up_proj.weight", linear.bfloat16()).dtype == torch.bfloat16
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_norm.weight"):
        assert not maker.quantizes(name)
        assert maker.dequantized(name, weights[name]) is weights[name]


@pytest.mark.parametrize("name", ["FP32", "FP16"])
def test_floating_point_schemes_quantize_nothing_and_hold_bf16_exactly(tiny_models: TinyModels, name: str) -> None:
    model_dir = tiny_models("qwen2", tied=True)
    maker = quantizer(model_dir, name=name)
    for key, weight in checkpoint(model_dir).items():
        assert not maker.quantizes(key)
        normal = weight.abs() > 6.2e-5  # below, float16 is coarser than bf16
        assert torch.equal(maker.dequantized(key, weight)[normal], weight[normal])
    third = torch.tensor([[1 / 3]])
    assert torch.equal(maker.dequantized("lm_head.weight", third), third.half().float() if name == "FP16" else third)


@pytest.mark.parametrize("options", [{"name": "FP16"}, {"provider": "cuda"}])
def test_a_value_beyond_float16_is_named(tiny_models: TinyModels, options: dict[str, str]) -> None:
    model_dir = tiny_models("qwen3")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        weights = checkpoint(model_dir)
        weights[name].view(-1)[3] = 70000
        with pytest.raises(WeightsError, match=rf"{name}.* holds 70144, more than float16's largest value"):
            list(quantizer(model_dir, **options).quantize(weights.items()))
        assert list(quantizer(model_dir).quantize(weights.items()))


def test_streaming_is_deterministic_and_order_of_the_packed_parts_does_not_matter(tiny_models: TinyModels) -> None:
    model_dir = tiny_models("qwen2")
    weights = checkpoint(model_dir)
    forward = dict(quantizer(model_dir).quantize(weights.items()))
    backward = dict(quantizer(model_dir).quantize(reversed(weights.items())))
    assert forward.keys() == backward.keys()
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


def test_offenders_lists_every_tensor_that_does_not_fit(tiny_models: TinyModels) -> None:
    model_dir = tiny_models("qwen3")
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint(model_dir).items()}
    assert quantizer(model_dir).offenders(shapes) == []
    shapes["model.layers.0.mlp.up_proj.weight"] = (256, 100)
    shapes["model.layers.1.self_attn.o_proj.weight"] = (128, 90)
    shapes["model.layers.1.mlp.experts.0.up_proj.weight"] = (128, 64)
    lines = quantizer(model_dir, ignore=("model.layers.0.self_attn.q_proj", "lm_hed")).offenders(shapes)
    assert {line.split(":")[0] for line in lines} == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "scheme.ignore 'lm_hed'",
        "model.layers.0.self_attn",
    }
    assert len(lines) == 5
    assert "input size 100 is not a multiple of group_size 32" in lines[0]
    assert any("did you mean 'lm_head'?" in line for line in lines)


def test_layers_that_the_builder_would_take_for_the_head_are_named(tiny_models: TinyModels) -> None:
    """The vocabulary has 36 tokens, and k and v of one head have 36 outputs."""
    model_dir = tiny_models("qwen3", head_dim=36, num_kv_heads=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint(model_dir).items()}
    lines = quantizer(model_dir, group_size=16).offenders(shapes)
    assert [line.split(":")[0] for line in lines] == [
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(2) for part in ("k", "v")
    ]
    assert all("output size 36 is the size of the vocabulary" in line for line in lines)


def test_an_unsupported_model_or_scheme_is_refused_with_every_reason() -> None:
    model = {"model_type": "gemma3", "use_sliding_window": True}
    wrong = SchemeSpec(quantizer="onnx-matmulnbits", name="W8A16", bits=4, group_size=48, symmetric=False)
    with pytest.raises(PreflightError) as caught:
        OnnxMatMulNBitsQuantizer(wrong, model)
    assert len(caught.value.offenders) == 5
    with pytest.raises(PreflightError, match="bits must be 4 or 8, got 3"):
        OnnxMatMulNBitsQuantizer(wrong.model_copy(update={"bits": 3}), model)
    wrong = SchemeSpec(quantizer="onnx-float", name="FP16", bits=32, group_size=32, provider="cuda")
    with pytest.raises(PreflightError) as caught:
        OnnxFloatQuantizer(wrong, model)
    assert len(caught.value.offenders) == 5
    with pytest.raises(PreflightError, match="no attention in float32"):
        OnnxFloatQuantizer(SchemeSpec(quantizer="onnx-float", name="FP32", bits=32, provider="cuda"), {"model_type": "llama"})
    with pytest.raises(PreflightError, match=r"'W4A8' is not one of W4A16 \(4 bits on cuda\)"):
        OnnxMatMulNBitsQuantizer(scheme("W4A8", provider="cuda"), {"model_type": "llama"})


def test_a_tied_head_of_8_bits_stays_in_floating_point(tiny_models: TinyModels) -> None:
    """The builder would store a quantized head beside a float embedding: two matrices where the learner has one."""
    model_dir = tiny_models("qwen3", tied=True)
    assert not quantizer(model_dir, name="W8A16").quantizes("model.embed_tokens.weight")
    assert quantizer(tiny_models("qwen3"), name="W8A16").quantizes("lm_head.weight")
    with pytest.raises(PreflightError, match=r"scheme\.ignore must name 'lm_head'"):
        quantizer(model_dir, name="W8A16", ignore=("model.layers.0.mlp.up_proj",))


def test_missing_packed_parts_and_unknown_tensors_are_errors(tiny_models: TinyModels) -> None:
    model_dir = tiny_models("qwen3")
    weights = checkpoint(model_dir)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        list(quantizer(model_dir).quantize(weights.items()))
    with pytest.raises(WeightsError, match="visual"):
        list(quantizer(model_dir).quantize([("visual.weight", torch.zeros(2, 2))]))


def test_a_non_finite_weight_never_reaches_the_file(tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("qwen3")
    for bad in (torch.nan, torch.inf):
        weights = checkpoint(model_dir)
        weights["model.layers.1.mlp.down_proj.weight"][5, 7] = bad
        with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.down_proj"):
            write_weights(tmp_path / WEIGHTS_FILE, quantizer(model_dir).quantize(weights.items()), 200)


def test_the_graph_points_into_the_weights_file_and_needs_no_other(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Built from a folder without weights, as a run does when the learner holds them."""
    import shutil

    import onnx

    model_dir = tiny_models("llama")
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    out = tmp_path / "out"
    out.mkdir()
    maker = quantizer(model_dir)
    write_weights(out / WEIGHTS_FILE, maker.quantize(checkpoint(model_dir).items()), 200)
    maker.scaffold(bare, out)
    assert {file.name for file in out.iterdir()} >= {"model.onnx", WEIGHTS_FILE, "genai_config.json", "tokenizer.json"}
    assert not list(out.glob("*.data"))
    layout = tensor_layout(out / WEIGHTS_FILE)
    outside = [t for t in onnx.load(str(out / "model.onnx"), load_external_data=False).graph.initializer if t.external_data]
    assert {t.name for t in outside} == set(layout)
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place == {"location": WEIGHTS_FILE, "offset": str(layout[tensor.name][2]), "length": str(layout[tensor.name][3])}


def test_a_failing_builder_reports_its_last_lines(tiny_models: TinyModels, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_models("qwen3"), broken)
    (broken / "config.json").write_text('{"model_type": "qwen3", "architectures": ["NobodyForCausalLM"]}')
    maker = quantizer(tiny_models("qwen3"))
    write_weights(tmp_path / WEIGHTS_FILE, maker.quantize(checkpoint(tiny_models("qwen3")).items()), 200)
    with pytest.raises(EngineError, match=r"builder failed with exit code 1.*\n.*"):
        maker.scaffold(broken, tmp_path)


def test_a_weights_file_of_another_scheme_does_not_pass_as_this_one(tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("qwen3")
    write_weights(tmp_path / WEIGHTS_FILE, quantizer(model_dir, group_size=32).quantize(checkpoint(model_dir).items()), 200)
    with pytest.raises(EngineError, match=r"up_proj\.MatMul\.weight_scales"):
        quantizer(model_dir, group_size=64).scaffold(model_dir, tmp_path)
