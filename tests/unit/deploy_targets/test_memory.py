"""The memory that serving takes, against sums done by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deploy_targets import memory
from deploy_targets.catalog import resolve
from deploy_targets.device import runs_on_gpu
from deploy_targets.engines.llamacpp_options import LlamaCppOptions
from deploy_targets.hardware import describe_machine
from deploy_targets.memory import memory_need, memory_offenders
from deploy_targets.profile import HardwareSpec, TargetProfile, load_profile

NvidiaSmi = Callable[..., None]
CONFIG = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
SHAPES = {"model.embed_tokens.weight": (131072, 4096), "model.layers.0.mlp.up_proj.weight": (2**20, 4096)}
GIB = 2**30


class QuantizesNothing:
    def quantizes(self, name: str) -> bool:
        return False


class QuantizesLayers:
    def quantizes(self, name: str) -> bool:
        return name.endswith("_proj.weight")


def offenders(profile: TargetProfile) -> list[str]:
    return memory_offenders(profile, quantizer(profile), CONFIG, SHAPES)


def quantizer(profile: TargetProfile):  # type: ignore[no-untyped-def]
    return resolve("quantizer", profile.scheme.quantizer, "")(profile.scheme, CONFIG)


def test_weights_and_cache_are_what_the_sum_by_hand_gives() -> None:
    profile = load_profile("int4-vllm-24gb")
    need = memory_need(profile, quantizer(profile), CONFIG, SHAPES)
    assert need.weights_gib == (131072 * 4096 * 2 + 2**32 * (4 / 8 + 2 / 32)) / GIB
    assert need.kv_gib == 8192 * 2 * 32 * 8 * 128 * 2 / GIB


def test_an_fp8_cache_takes_half() -> None:
    profile = load_profile("int4-vllm")
    halved = load_profile("int4-vllm-fp8kv")
    assert (
        memory_need(halved, quantizer(profile), CONFIG, SHAPES).kv_gib
        == 0.5 * memory_need(profile, quantizer(profile), CONFIG, SHAPES).kv_gib
    )


@pytest.mark.parametrize(
    ("name", "value_bytes", "scale_bytes", "cache_bytes"),
    [
        ("fp32-onnx", 4, 0, 4), ("fp16-onnx", 2, 0, 2), ("int4-onnx", 4, 4, 4), ("int8-onnx", 4, 4, 4), ("int4-onnx-cuda", 2, 2, 2),
        ("bf16-vllm", 2, 0, 2), ("bf16-transformers", 2, 0, 2), ("fp8-vllm", 2, 2, 2),
    ],
)  # fmt: skip
def test_values_and_cache_take_the_bytes_of_the_targets_dtype(name: str, value_bytes: int, scale_bytes: int, cache_bytes: int) -> None:
    """The embedding is never quantized, the other matrix where the scheme has scales."""
    profile = load_profile(name).model_copy(update={"max_model_len": 512})
    bits, group = profile.scheme.bits, profile.scheme.group_size or 4096
    need = memory_need(profile, QuantizesLayers() if scale_bytes else QuantizesNothing(), CONFIG, SHAPES)  # type: ignore[arg-type]
    matrix = 2**32 * (bits / 8 + scale_bytes / group) if scale_bytes else 2**32 * value_bytes
    assert need.weights_gib == (131072 * 4096 * value_bytes + matrix) / GIB
    assert need.kv_gib == 512 * 2 * 32 * 8 * 128 * cache_bytes / GIB


@pytest.mark.parametrize(("dtype", "cache_bytes"), [("f16", 2), ("bf16", 2), ("f32", 4), ("q8_0", 34 / 32)])
def test_a_cache_of_llama_cpp_takes_the_bytes_of_its_dtype(dtype: str, cache_bytes: float) -> None:
    assert LlamaCppOptions(kv_cache_dtype=dtype, flash_attention=True).cache_bytes(4) == cache_bytes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "num_sequences"),
    [
        ({"num_threads": 16, "max_batch_size": 64}, 1024),
        ({"num_threads": 16, "max_batch_size": 64, "threads_per_batch": 16}, 64),
        ({"num_threads": 1, "max_batch_size": 1, "threads_per_batch": 2}, 1),
    ],
)
def test_llama_cpp_takes_the_caches_of_all_batches(options: dict[str, Any], num_sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3-8B: 128 KiB a token in f16."""
    profile = load_profile("q4_k_m-llamacpp")
    profile = profile.model_copy(update={"engine": profile.engine.model_copy(update={"options": options})})
    need = memory_need(profile, QuantizesLayers(), CONFIG, SHAPES)  # type: ignore[arg-type]
    assert need.kv_gib == num_sequences * 512 * 128 / 2**20
    machine = replace(describe_machine(), memory_gib=48)
    monkeypatch.setattr(memory, "describe_machine", lambda: machine)
    lines = memory_offenders(profile, QuantizesLayers(), CONFIG, SHAPES)  # type: ignore[arg-type]
    assert [f"64.0 GiB of KV cache for {num_sequences} sequences of 512 tokens" in line and "max_batch_size" in line for line in lines] == [
        True
    ] * (num_sequences == 1024)


@pytest.mark.parametrize("name", ["bf16-transformers", "bf16-vllm"])
def test_an_engine_in_float32_takes_twice_the_memory(name: str) -> None:
    profile = load_profile(name)
    engine = profile.engine.model_copy(update={"options": {**profile.engine.options, "dtype": "float32"}})
    need, doubled = (
        memory_need(given, quantizer(profile), CONFIG, SHAPES) for given in (profile, profile.model_copy(update={"engine": engine}))
    )
    assert (doubled.weights_gib, doubled.kv_gib) == (2 * need.weights_gib, 2 * need.kv_gib)


def test_a_model_that_fits_the_large_card_and_not_the_small_one() -> None:
    large = load_profile("int4-vllm-24gb")
    assert offenders(large) == []
    assert offenders(large.model_copy(update={"hardware": HardwareSpec(devices=("cuda",), memory_gib=8)})) == [
        "memory: 3.2 GiB of weights + 6.0 GiB of KV cache + 1.0 GiB for the rest = 10.2 GiB, and the target has 7.2 GiB. "
        "Choose fewer bits, a smaller model, a lower max_model_len, or a KV cache in FP8"
    ]


def test_a_cache_too_small_for_one_sequence_is_named() -> None:
    profile = load_profile("int4-vllm-24gb")
    engine = profile.engine.model_copy(update={"options": {**profile.engine.options, "kv_cache_gib": 0.5}})
    (line,) = offenders(profile.model_copy(update={"engine": engine}))
    assert "one sequence of 8192 tokens, which takes 1.00 GiB" in line


@pytest.mark.parametrize("positions", [1024, 40960])
def test_the_model_may_be_what_limits_the_cache(positions: int) -> None:
    profile = load_profile("int4-vllm-24gb")
    need = memory_need(profile, quantizer(profile), {**CONFIG, "max_position_embeddings": positions}, SHAPES)
    assert need.kv_gib == min(positions, 8192) * 2 * 32 * 8 * 128 * 2 / GIB


SMALL_GPU = "NVIDIA GeForce RTX 4060, 8188 MiB"


def memory_of(text: str) -> str:
    """What a line says the target has."""
    return text.partition("the target has ")[2].partition(" GiB")[0]


@pytest.mark.parametrize("name", ["int4-onnx", "fp32-onnx", "q4_k_m-llamacpp"])
def test_a_target_that_runs_on_the_cpu_is_held_against_the_machines_memory(
    name: str, nvidia_smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 56 GiB and more: too many for the GPU, which is not asked, and a matter of the other memory alone."""
    nvidia_smi(SMALL_GPU)
    profile = load_profile(name)
    shapes = {"model.layers.0.mlp.up_proj.weight": (2**20, 28672)}

    def lines(memory_gib: float) -> list[str]:
        machine = replace(describe_machine(), memory_gib=memory_gib)
        monkeypatch.setattr(memory, "describe_machine", lambda: machine)
        return memory_offenders(profile, QuantizesNothing(), CONFIG, shapes)  # type: ignore[arg-type]

    assert lines(2000) == []
    (line,) = lines(16)
    assert memory_of(line) == "16.0"
    assert "for the rest" not in line


@pytest.mark.parametrize(
    ("name", "options", "on_gpu"),
    [
        ("int4-vllm", {}, True),
        ("bf16-transformers", {}, True),
        ("bf16-transformers", {"device": "cuda:0"}, True),
        ("bf16-transformers", {"device": "cpu"}, False),
        ("int4-onnx-cuda", {}, True),
        ("int4-onnx", {}, False),
        ("q4_k_m-llamacpp", {}, False),
        ("q4_k_m-llamacpp", {"num_gpu_layers": 99}, False),
        ("fake", {}, False),
    ],
)
def test_where_a_target_runs_on_a_machine_with_a_gpu(name: str, options: dict[str, Any], on_gpu: bool, nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(SMALL_GPU)
    profile = load_profile(name)
    engine = profile.engine.model_copy(update={"options": {**profile.engine.options, **options}})
    assert runs_on_gpu(profile.model_copy(update={"engine": engine})) == on_gpu


def test_layers_on_the_gpu_count_where_the_profile_has_the_device(nvidia_smi: NvidiaSmi) -> None:
    nvidia_smi(SMALL_GPU)
    profile = load_profile("q4_k_m-llamacpp")
    hardware = profile.hardware.model_copy(update={"devices": ("cpu", "cuda")})
    for num_layers in (0, 99):
        engine = profile.engine.model_copy(update={"options": {"num_gpu_layers": num_layers}})
        assert runs_on_gpu(profile.model_copy(update={"engine": engine, "hardware": hardware})) == bool(num_layers)
