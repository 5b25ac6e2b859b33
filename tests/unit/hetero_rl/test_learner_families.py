"""The learner on models whose checkpoints are laid out otherwise than Qwen3's: fused layers (Phi-3) and experts (Qwen3-MoE)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy_targets.catalog import make_quantizer
from deploy_targets.errors import UsageError
from deploy_targets.profile import load_profile
from deploy_targets.saved_names import saved_views
from deploy_targets.types import WEIGHTS_FILE, TokenSequence
from hetero_rl.learner import attention
from hetero_rl.learner.fake_quant import TwinExperts, add_twin, twin
from hetero_rl.learner.model import load_causal_lm, stored_tensors
from hetero_rl.publish import Publisher
from tests.conftest import TinyModels
from tests.learners import MakeLearner, as_sequences, quantizer_for, sequences, unconstrained

FAMILIES = ["phi3", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [0, 3])
def test_weights_are_handed_out_as_they_are_saved(family: str, stage: int, make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    """Names and bytes of the file before training; every tensor moves by training, with the twin's pull beside the policy's."""
    learner = make_learner("grey_box", folder=tiny_models(family), zero_stage=stage)
    saved = load_file(tiny_models(family) / WEIGHTS_FILE)
    before = {name: tensor.clone() for name, tensor in learner.named_tensors()}
    assert before.keys() == saved.keys()
    assert all(torch.equal(before[name], saved[name]) for name in saved)
    for _ in range(3):
        stats = learner.update(sequences(), 0.3)
        assert stats.num_skipped == 0
        assert stats.sums.cost > 0
    assert [name for name, tensor in learner.named_tensors() if torch.equal(tensor, saved[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_plain_transformers(family: str, make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    batch = as_sequences(sequences())
    learner, lm = make_learner(folder=tiny_models(family)), load_causal_lm(tiny_models(family)).float()
    assert learner.packed
    gaps = []
    for sequence, score in zip(batch, learner.score(batch), strict=True):
        with torch.no_grad():
            log_probs = lm(torch.tensor([sequence.tokens])).logits[0].log_softmax(-1)
        places = torch.arange(sequence.prompt_len - 1, len(sequence.tokens) - 1)
        gaps.append(np.abs(score.logps - log_probs[places, torch.tensor(sequence.tokens[sequence.prompt_len :])].numpy()))
    assert np.concatenate(gaps).mean() < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_twin_computes_with_the_targets_weights(family: str, make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    """The twin equals a model whose weights were really replaced by the dequantized ones, exactly; experts are rounded one by one."""
    folder = tiny_models(family)
    learner, quantizer, batch = make_learner(folder=folder), quantizer_for(folder), as_sequences(sequences())
    plain, as_twin = learner.score(batch), learner.score(batch, as_twin=True)
    with torch.no_grad():
        for name, view in list(learner.named_tensors()):
            view.copy_(quantizer.dequantized(name, view))
    replaced = learner.score(batch)
    assert all((a.logps == b.logps).all() for a, b in zip(as_twin, replaced, strict=True))
    assert max(np.abs(a.logps - b.logps).max() for a, b in zip(as_twin, plain, strict=True)) > 1e-3


def test_gradient_passes_straight_through_the_rounding_of_experts(tiny_models: TinyModels) -> None:
    folder = tiny_models("qwen3_moe")
    lm, other, quantizer = load_causal_lm(folder).float(), load_causal_lm(folder).float(), quantizer_for(folder)
    stored = stored_tensors(load_causal_lm(folder), folder)
    layers = add_twin(lm, quantizer, stored)
    assert sum(isinstance(layer, TwinExperts) for layer in layers) == 2
    with torch.no_grad():
        for held, parameter in other.named_parameters():
            for name, view in saved_views(held, parameter, stored):
                view.copy_(quantizer.dequantized(name, view))
    ids = torch.arange(3, 20)[None]
    with twin(layers):
        lm(ids).logits.pow(2).sum().backward()
    other(ids).logits.pow(2).sum().backward()
    for (name, a), (_, b) in zip(lm.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6 * float(b.grad.abs().max())), name


def test_experts_that_are_kept_have_no_twin(tiny_models: TinyModels) -> None:
    folder, profile = tiny_models("qwen3_moe"), load_profile("int4-vllm")
    scheme = profile.scheme.model_copy(update={"ignore": ("lm_head", r"re:.*\.experts\.")})
    lm = load_causal_lm(folder)
    layers = add_twin(lm, make_quantizer(profile.model_copy(update={"scheme": scheme}), folder), stored_tensors(lm, folder))
    assert len(layers) == 8
    assert not any(isinstance(layer, TwinExperts) for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_is_published_and_proven(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    folder, profile = tiny_models(family), load_profile("bf16-transformers")
    quantizer = make_quantizer(profile, folder)
    learner = unconstrained(folder, quantizer, lr=1e-3, warmup_steps=0)
    probes = [TokenSequence(tuple(range(3 + i, 15 + i)), 4) for i in range(8)]
    publisher = Publisher(learner, quantizer, profile, folder, tmp_path / "serving")
    try:
        reference = publisher.calibrate(probes)
        old = np.concatenate([score.logps for score in publisher.engine.score(probes)])
        learner.update(sequences(), 0.0)
        stats = publisher.publish(1)
        assert stats.proof_gap <= max(5 * reference, 0.02)
        assert publisher.num_rebuilds == 0
        assert np.abs(np.concatenate([score.logps for score in publisher.engine.score(probes)]) - old).max() > 0.05
        # The file that is served is a checkpoint that transformers reads.
        assert {name for name, _ in learner.named_tensors()} == set(load_file(publisher.folder / WEIGHTS_FILE))
    finally:
        publisher.close()
        learner.close()


@pytest.mark.parametrize("change", ["extra", "swapped"])
def test_a_checkpoint_that_is_not_held_as_it_is_stored_is_refused(change: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models("qwen3_moe"), tmp_path / "model"))
    lm = load_causal_lm(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    one, other = "model.layers.0.mlp.experts.1.gate_proj.weight", "model.layers.0.mlp.experts.1.up_proj.weight"
    if change == "extra":
        tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.zeros(4)
    else:
        tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(UsageError, match="e_score_correction_bias" if change == "extra" else "does not hold model.layers.0.mlp.experts.1"):
        stored_tensors(lm, folder)


def test_a_head_that_is_stored_beside_its_embedding_is_no_other_weight(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models("qwen2", tied=True), tmp_path / "model"))
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / WEIGHTS_FILE, {"format": "pt"})
    assert "lm_head.weight" in stored_tensors(load_causal_lm(folder), folder)


@pytest.mark.parametrize(("window", "packed"), [(None, True), (4, False), (128, False), (attention.LONGEST_PACKED, True)])
def test_a_window_is_packed_only_where_it_hides_nothing(window: int | None, packed: bool, tiny_models: TinyModels) -> None:
    lm = load_causal_lm(tiny_models("phi3", extra_config={"sliding_window": window}))
    assert attention.follows_packing(lm) == packed


@pytest.mark.parametrize("window", [4, 16])
def test_a_window_is_that_of_transformers(window: int, make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    folder = tiny_models("phi3", extra_config={"sliding_window": window})
    lm, ids = load_causal_lm(folder).float(), torch.arange(3, 33)[None]
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        expected = lm(ids).logits[0].log_softmax(-1)[3:-1].gather(1, ids[0, 4:, None])[:, 0].numpy()
    [score] = make_learner(folder=folder).score([TokenSequence(tuple(range(3, 33)), 4)])
    assert np.abs(score.logps - expected).max() < 0.05
