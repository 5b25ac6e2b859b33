"""AWQ: what feeds what, scales that fold without a rounding, and an output error that is no larger."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deploy_targets.profile import SchemeSpec
from deploy_targets.quantizers.awq import Fold, folds, output_error, search_scales
from deploy_targets.quantizers.int4_grid import GridRule, find_grid, nearest
from deploy_targets.quantizers.int4_rounding import Int4Rounding
from tests.conftest import TinyModels
from tests.models import Family

LAYER = "model.layers.3"


def served_by(rule: GridRule) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: nearest(weight, find_grid(weight, rule)).dequantized().float()


def gram_of(columns: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, columns, generator=generator) * (spread * torch.randn(columns, generator=generator)).exp()
    return inputs.T @ inputs / len(inputs)


def test_folds_of_a_layer() -> None:
    names = [f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkvo"] + [
        f"{LAYER}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    ]
    found = {fold.source: fold for fold in folds([*names, "lm_head.weight"])}
    assert found[f"{LAYER}.input_layernorm"] == Fold(f"{LAYER}.input_layernorm", tuple(names[:3]))
    assert found[f"{LAYER}.mlp.up_proj"].consumers == (names[6],)
    assert set(found) == {f"{LAYER}.{part}" for part in ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")}
    # A norm also feeds the layer that is not quantized: nothing may be folded into it.
    assert f"{LAYER}.input_layernorm" not in {fold.source for fold in folds(names[1:])}


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_powers_of_two_and_the_output_error_is_lower(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(rows, 128, generator=generator) for rows in (32, 16)]
    gram, rule = gram_of(128), GridRule(32, symmetric)
    scales = search_scales(weights, gram, served_by(rule))
    assert torch.equal(scales, torch.exp2(scales.log2().round()))
    assert len(scales.unique()) > 2
    assert scales[gram.diagonal().argmax()] > scales[gram.diagonal().argmin()]
    scaled = sum(output_error(served_by(rule)(weight * scales) / scales - weight, gram) for weight in weights)
    plain = sum(output_error(served_by(rule)(weight) - weight, gram) for weight in weights)
    assert scaled < 0.9 * plain


def test_even_or_absent_inputs_are_not_scaled() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for gram in (torch.eye(64), torch.zeros(64, 64)):
        assert torch.equal(search_scales([weight], gram, served_by(GridRule(32))), torch.ones(64))


def test_the_output_error_is_the_mean_square_length() -> None:
    generator = torch.Generator().manual_seed(0)
    error, inputs = torch.randn(8, 32, generator=generator), torch.randn(50, 32, generator=generator)
    assert output_error(error, inputs.T @ inputs / 50) == pytest.approx(float((inputs @ error.T).square().sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize(("family", "options"), [("qwen3", {}), ("qwen2", {"tied": True}), ("llama", {"num_kv_heads": 4})])
def test_folding_alone_leaves_every_logit_as_it_was(family: Family, options: dict[str, object], tiny_models: TinyModels) -> None:
    model_dir = tiny_models(family, **options)
    rounding = Int4Rounding(SchemeSpec(quantizer="autoawq", name="W4A16", bits=4, group_size=32, algorithm="awq"))
    tensors = load_file(model_dir / "model.safetensors")
    quantized = [name for name in tensors if "_proj.weight" in name]
    rounding.calibrate(tensors.items(), {name: gram_of(tensors[name].shape[1], seed=tensors[name].shape[1]) for name in quantized})
    changed = {name for name, tensor in tensors.items() if not torch.equal(rounding.folded(name, tensor), tensor)}
    for part in ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
        assert f"model.layers.0.{part}" in changed
    assert "model.layers.0.self_attn.v_proj.weight" in changed
    assert "model.layers.0.self_attn.v_proj.bias" not in changed
    if family == "llama":  # as many key-value heads as heads: v feeds o channel by channel
        assert "model.layers.0.self_attn.o_proj.weight" in changed
    else:
        assert "model.layers.0.self_attn.o_proj.weight" not in changed

    plain, folded = (AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        for name, parameter in folded.named_parameters():
            parameter.copy_(rounding.folded(name, parameter))
        tokens = torch.randint(3, 36, (2, 12), generator=torch.Generator().manual_seed(0))
        assert torch.allclose(plain(tokens).logits, folded(tokens).logits, rtol=0, atol=1e-9)
