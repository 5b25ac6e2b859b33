"""Which arithmetic the learner chooses, and that float32 changes the rounding and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from deploy_targets.errors import UsageError
from hetero_rl.learner import compute
from hetero_rl.learner.compute import choose_dtype, compute_in_float32
from hetero_rl.learner.model import load_causal_lm
from tests.conftest import TinyModels


@pytest.fixture
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models("qwen2")  # with biases


@pytest.fixture
def layer_norm_model() -> torch.nn.Module:
    config = GPTNeoXConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return GPTNeoXForCausalLM(config).bfloat16()


@pytest.mark.parametrize(
    ("speedup", "on_cuda", "dtype"),
    [(0.6, False, torch.float32), (1.2, False, torch.float32), (3.0, False, torch.bfloat16), (0.6, True, torch.bfloat16)],
)
def test_auto_follows_the_machine(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, speedup: float, on_cuda: bool, dtype: torch.dtype
) -> None:
    lm = load_causal_lm(model_dir)
    monkeypatch.setattr(compute, "bf16_speedup", lambda: speedup)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    assert choose_dtype("auto", lm) is dtype
    assert choose_dtype("float32", lm) is torch.float32
    assert choose_dtype("bfloat16", lm) is torch.bfloat16


def test_the_speedup_is_measured() -> None:
    assert 0.01 < compute.bf16_speedup() < 100


def test_layers_that_cannot_mix_dtypes(layer_norm_model: torch.nn.Module) -> None:
    assert choose_dtype("auto", layer_norm_model) is torch.bfloat16
    with pytest.raises(UsageError, match="LayerNorm"):
        choose_dtype("float32", layer_norm_model)


def test_float32_is_nearer_to_the_exact_log_probs(model_dir: Path) -> None:
    ids = torch.arange(3, 33)[None]
    exact_lm, bf16_lm, float32_lm = load_causal_lm(model_dir).double(), load_causal_lm(model_dir), load_causal_lm(model_dir)
    compute_in_float32(float32_lm)
    with torch.no_grad():
        exact, bf16, float32 = (lm(ids).logits.double().log_softmax(-1).numpy() for lm in (exact_lm, bf16_lm, float32_lm))
    assert np.abs(float32 - exact).max() < 1e-4
    assert np.abs(bf16 - exact).max() > 1e-3


def test_weights_and_gradients_stay_bf16(model_dir: Path) -> None:
    lm, reference = load_causal_lm(model_dir), load_causal_lm(model_dir).float()
    names = list(lm.state_dict())
    compute_in_float32(lm)
    assert list(lm.state_dict()) == names
    ids = torch.arange(3, 33)[None]
    for model in (lm, reference):
        model(ids).logits.pow(2).sum().backward()
    for (name, parameter), expected in zip(lm.named_parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
        assert torch.allclose(parameter.grad.float(), expected.grad, rtol=0.01, atol=1e-3 * float(expected.grad.abs().max())), name
