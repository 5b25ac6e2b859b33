"""The memory that serving takes, against sums done by hand."""

from __future__ import annotations

import pytest

from deploy_targets.catalog import resolve
from deploy_targets.memory import memory_need, memory_offenders
from deploy_targets.profile import HardwareSpec, TargetProfile, load_profile

CONFIG = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
SHAPES = {"model.embed_tokens.weight": (131072, 4096), "model.layers.0.mlp.up_proj.weight": (2**20, 4096)}
GIB = 2**30


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
