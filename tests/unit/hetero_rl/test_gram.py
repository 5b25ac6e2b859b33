"""Gram matrices of layer inputs: every real token once, no padding, and the same bits again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deploy_targets.quantizers.compressed_tensors import CompressedTensorsQuantizer
from deploy_targets.types import TokenSequence
from hetero_rl.learner.deepspeed_learner import Learner
from tests.conftest import TinyModels
from tests.learners import as_sequences, quantizer_for, sequences, unconstrained


def make(model_dir: Path, max_tokens: int, quantizer: CompressedTensorsQuantizer | None = None) -> Learner:
    return unconstrained(model_dir, quantizer or quantizer_for(model_dir), tokens_per_micro_batch=max_tokens, compute_dtype="float32")


@pytest.fixture
def learner(tiny_models: TinyModels) -> Iterator[Learner]:
    learner = make(tiny_models("qwen3"), 64)
    yield learner
    learner.close()


def one_by_one(learner: Learner, batch: list[TokenSequence]) -> dict[str, torch.Tensor]:
    """Every layer's inputs gathered while the model reads one sequence at a time; float64."""
    gathered: dict[str, list[torch.Tensor]] = {layer.weight_name: [] for layer in learner.twins}
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: gathered[module.weight_name].append(inputs[0][0].double()))
        for layer in learner.twins
    ]
    with torch.no_grad():
        for sequence in batch:
            learner.policy.lm(input_ids=torch.tensor([sequence.tokens[:-1]]))
    for hook in hooks:
        hook.remove()
    return {name: (inputs := torch.cat(parts)).T @ inputs / len(inputs) for name, parts in gathered.items()}


def test_ragged_rows_give_what_single_ones_give(learner: Learner) -> None:
    batch = as_sequences(sequences(24))
    assert len({len(sequence.tokens) for sequence in batch}) > 4, "nothing is padded"
    grams, wanted = learner.input_grams(batch), one_by_one(learner, batch)
    assert set(grams) == set(wanted) == {layer.weight_name for layer in learner.twins}
    for name, gram in grams.items():
        assert gram.dtype == torch.float32
        assert torch.allclose(gram.double(), wanted[name], rtol=1e-4, atol=1e-5 * float(wanted[name].abs().max())), name


def test_shared_inputs_are_counted_once(learner: Learner) -> None:
    grams = learner.input_grams(as_sequences(sequences(6)))
    q, k, v, o, gate, up, down = (
        grams[f"model.layers.1.{part}_proj.weight"]
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    )
    assert q is k is v
    assert gate is up
    assert len({id(gram) for gram in grams.values()}) == 2 * 4
    assert down.shape == (256, 256)
    assert o.shape == (128, 128)


def test_the_same_call_gives_the_same_bits_and_leaves_no_hook(learner: Learner) -> None:
    batch = as_sequences(sequences(24))
    first, again = learner.input_grams(batch), learner.input_grams(batch)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(layer._forward_pre_hooks for layer in learner.twins)


def test_a_quantized_head_is_counted_too(tiny_models: TinyModels) -> None:
    from deploy_targets.profile import SchemeSpec

    scheme = SchemeSpec(quantizer="compressed-tensors", name="W4A16", bits=4, group_size=32, ignore=(), algorithm="gptq")
    learner = make(tiny_models("qwen3"), 64, CompressedTensorsQuantizer(scheme, {}))
    batch = as_sequences(sequences(8))
    grams, wanted = learner.input_grams(batch)["lm_head.weight"], one_by_one(learner, batch)["lm_head.weight"]
    assert torch.allclose(grams.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    learner.close()
