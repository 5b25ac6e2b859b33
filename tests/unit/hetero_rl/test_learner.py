"""The DeepSpeed learner: its numbers are those of plain PyTorch, however a batch is cut, at every ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy_targets.errors import UsageError
from deploy_targets.profile import load_profile
from deploy_targets.quantizers.compressed_tensors import CompressedTensorsQuantizer
from deploy_targets.types import TokenSequence
from hetero_rl.config import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.errors import DivergedError
from hetero_rl.learner import attention
from hetero_rl.learner.attention import short_causal_attention
from hetero_rl.learner.batching import micro_batches
from hetero_rl.learner.deepspeed_learner import Learner, load_causal_lm
from hetero_rl.learner.fake_quant import add_twin, twin
from hetero_rl.types import TrainSequence
from tests.conftest import TinyModels
from tests.models import tiny_model

MakeLearner = Callable[..., Learner]


def quantizer_for(model_dir: Path) -> CompressedTensorsQuantizer:
    return CompressedTensorsQuantizer(load_profile("int4-vllm").scheme, json.loads((model_dir / "config.json").read_text()))


@pytest.fixture
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models("qwen3")


@pytest.fixture
def make_learner(model_dir: Path) -> Iterator[MakeLearner]:
    made: list[Learner] = []

    def make(signal: str = "off", folder: Path = model_dir, algorithm: AlgorithmConfig | None = None, **options: object) -> Learner:
        config = LearnerConfig.model_validate({"lr": 1e-3, "warmup_steps": 0, **options})
        constraint = ConstraintConfig.model_validate({"signal": signal})
        learner = Learner(
            folder, quantizer_for(folder), config, algorithm or AlgorithmConfig(), constraint, temperature=1.0, num_updates=100, seed=0
        )
        made.append(learner)
        return learner

    yield make
    for learner in made:
        learner.close()


def sequences(num: int = 12, seed: int = 0, longest: int = 9) -> list[TrainSequence]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        tokens = generator.integers(3, 30, generator.integers(1, longest + 1)).astype(np.int32)
        prompt = tuple(generator.integers(3, 30, generator.integers(1, 8)).tolist())
        made.append(
            TrainSequence(prompt, tokens, np.log(generator.uniform(0.01, 0.9, len(tokens))).astype(np.float32), float(generator.normal()))
        )
    return made


def as_sequences(batch: list[TrainSequence]) -> list[TokenSequence]:
    return [TokenSequence((*s.prompt, *map(int, s.tokens)), len(s.prompt)) for s in batch]


def grouped(num_prompts: int = 5, seed: int = 0) -> list[TrainSequence]:
    """Ragged groups: several prompts, each with responses of its own, in mixed order."""
    batch = [replace(s, prompt=prompt.prompt) for i, prompt in enumerate(sequences(num_prompts, seed)) for s in sequences(1 + i, seed + i)]
    np.random.default_rng(seed).shuffle(batch)  # type: ignore[arg-type]
    return batch


@pytest.mark.parametrize("packed", [False, True])
def test_batches_cover_every_token_once(packed: bool) -> None:
    batch = grouped()
    seen: dict[int, np.ndarray] = {}
    for micro in micro_batches([s.prompt for s in batch], [s.tokens for s in batch], 40, torch.device("cpu"), packed=packed):
        assert micro.input_ids.numel() <= 40 or len(micro.indices) == 1
        predicted = micro.targets.float()
        seen |= dict(micro.unflatten(predicted))
        before = micro.input_ids.flatten()[micro.places]  # the token before each response token
        for index, tokens in micro.unflatten(before):
            assert tokens.tolist() == [batch[index].prompt[-1], *batch[index].tokens[:-1]]
    assert {i: seen[i].astype(int).tolist() for i in seen} == {i: s.tokens.tolist() for i, s in enumerate(batch)}


def test_a_packed_batch_holds_each_prompt_once_and_no_padding() -> None:
    batch = grouped()
    [micro] = micro_batches([s.prompt for s in batch], [s.tokens for s in batch], 1000, torch.device("cpu"), packed=True)
    prompts = {s.prompt for s in batch}
    assert micro.input_ids.shape == (1, sum(map(len, prompts)) + sum(len(s.tokens) - 1 for s in batch))


@pytest.mark.parametrize("longest_plain", [256, 4])
def test_packed_equals_padded(make_learner: MakeLearner, monkeypatch: pytest.MonkeyPatch, longest_plain: int) -> None:
    """The same scores, loss and gradient with prompts shared and with a row per sequence, by our products and by torch's kernel."""
    monkeypatch.setattr(attention, "LONGEST", longest_plain)
    batch, found = grouped(), []
    for packed in (True, False):
        learner = make_learner("grey_box", tokens_per_micro_batch=60, compute_dtype="float32")
        assert learner.packed
        learner.packed = packed
        logps = np.concatenate([score.logps for score in learner.score(as_sequences(batch))])
        found.append((logps, learner.update(batch, 0.3)))
    (packed_logps, packed_update), (padded_logps, padded_update) = found
    assert np.abs(packed_logps - padded_logps).max() < 1e-4
    assert packed_update.grad_norm == pytest.approx(padded_update.grad_norm, rel=1e-3)
    assert packed_update.policy_loss == pytest.approx(padded_update.policy_loss, rel=1e-3)
    assert packed_update.constraint_cost == pytest.approx(padded_update.constraint_cost, rel=1e-3)


def test_models_whose_attention_cannot_be_told_are_not_packed(tmp_path: Path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    assert not attention.follows_packing(load_causal_lm(tiny_model("qwen2", tmp_path, extra_config=sliding)))


def test_scores_are_those_of_plain_transformers(make_learner: MakeLearner, model_dir: Path) -> None:
    batch = as_sequences(sequences())
    lm = load_causal_lm(model_dir)
    for sequence, score in zip(batch, make_learner(tokens_per_micro_batch=64, logit_chunk_elements=1024).score(batch), strict=True):
        with torch.no_grad():
            logits = lm(torch.tensor([sequence.tokens])).logits[0].float()
        expected = logits.log_softmax(-1)[
            torch.arange(sequence.prompt_len - 1, len(sequence.tokens) - 1), torch.tensor(sequence.tokens[sequence.prompt_len :])
        ]
        assert np.abs(score.logps - expected.numpy()).max() < 0.03  # bf16: the order of sums differs with the padding
        assert (score.greedy_tokens == logits[sequence.prompt_len - 1 : -1].argmax(-1).numpy()).mean() > 0.8


def test_twin_computes_with_the_targets_weights(make_learner: MakeLearner, model_dir: Path) -> None:
    """The twin equals a model whose weights were really replaced by the dequantized ones, exactly."""
    learner, quantizer, batch = make_learner(), quantizer_for(model_dir), as_sequences(sequences())
    twin_scores = learner.score(batch, as_twin=True)
    plain_scores = learner.score(batch)
    with torch.no_grad():
        for name, parameter in learner.policy.lm.named_parameters():
            if quantizer.quantizes(name):
                parameter.copy_(quantizer.dequantized(name, parameter))
    replaced = learner.score(batch)
    assert all((a.logps == b.logps).all() for a, b in zip(twin_scores, replaced, strict=True))
    assert max(np.abs(a.logps - b.logps).max() for a, b in zip(twin_scores, plain_scores, strict=True)) > 1e-3


def test_straight_through_gradient(model_dir: Path) -> None:
    """Through the twin the weight gets the gradient that the rounded weight would get."""
    lm, other = load_causal_lm(model_dir).float(), load_causal_lm(model_dir).float()
    quantizer = quantizer_for(model_dir)
    layers = add_twin(lm, quantizer)
    assert {layer.weight_name for layer in layers} == {name for name, _ in lm.named_parameters() if quantizer.quantizes(name)}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if quantizer.quantizes(name):
                parameter.copy_(quantizer.dequantized(name, parameter))
    ids = torch.arange(3, 20)[None]
    with twin(layers):
        lm(ids).logits.pow(2).sum().backward()
    other(ids).logits.pow(2).sum().backward()
    for (name, a), (_, b) in zip(lm.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6 * float(b.grad.abs().max())), name
    assert not layers[0].as_twin


def test_gradient_does_not_depend_on_the_cut(make_learner: MakeLearner) -> None:
    """One micro-batch or many, one logit chunk or many: the same loss, gap and gradient norm up to bf16."""
    whole = make_learner("grey_box").update(sequences(), 0.3)
    cut = make_learner("grey_box", tokens_per_micro_batch=32, logit_chunk_elements=1024).update(sequences(), 0.3)
    assert cut.gap.num_tokens == whole.gap.num_tokens
    for field in ("policy_loss", "constraint_cost", "entropy_nats", "grad_norm"):
        assert getattr(cut, field) == pytest.approx(getattr(whole, field), rel=0.03, abs=2e-3), field


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_agree(make_learner: MakeLearner, stage: int) -> None:
    reference = make_learner("grey_box")
    sharded = make_learner("grey_box", zero_stage=stage)
    for _ in range(2):
        expected, got = reference.update(sequences(), 0.3), sharded.update(sequences(), 0.3)
        assert got.policy_loss == pytest.approx(expected.policy_loss, rel=0.02, abs=2e-3)
        assert got.constraint_cost == pytest.approx(expected.constraint_cost, rel=0.02, abs=2e-3)
    for (name, a), (other, b) in zip(reference.named_tensors(), sharded.named_tensors(), strict=True):
        assert name == other
        assert a.shape == b.shape
        assert torch.allclose(a.float(), b.float(), atol=0.02)


def test_tied_embeddings_are_handed_out_once(make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    names = [name for name, _ in make_learner(folder=tiny_models("qwen3", tied=True)).named_tensors()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_policy_gradient_raises_the_probability_of_good_tokens(make_learner: MakeLearner) -> None:
    learner, batch = make_learner(), [replace(s, advantage=1.0) for s in sequences(4)]
    before = np.concatenate([s.logps for s in learner.score(as_sequences(batch))]).mean()
    for _ in range(3):
        learner.update(batch, 0.0)
    assert np.concatenate([s.logps for s in learner.score(as_sequences(batch))]).mean() > before


@pytest.mark.parametrize("signal", ["grey_box", "loss"])
def test_penalty_lowers_its_cost(make_learner: MakeLearner, signal: str) -> None:
    batch = [replace(s, advantage=0.0) for s in sequences(16)]
    learner = make_learner(signal)
    costs = [learner.update(batch, 1.0).constraint_cost for _ in range(12)]
    assert costs[-1] < 0.9 * costs[0]


def test_lambda_zero_is_the_unconstrained_step(make_learner: MakeLearner) -> None:
    expected = make_learner("off").update(sequences(), 0.0)
    for signal in ("grey_box", "loss", "advantage"):
        assert make_learner(signal).update(sequences(), 0.0).grad_norm == expected.grad_norm


def test_nonfinite_engine_logps_change_nothing_else(make_learner: MakeLearner) -> None:
    batch = sequences(6)
    engine_logp = batch[0].engine_logp.copy()
    tokens = np.concatenate([batch[0].tokens, [5]]).astype(np.int32)
    dirty = [replace(batch[0], tokens=tokens, engine_logp=np.concatenate([engine_logp, [np.nan]]).astype(np.float32)), *batch[1:]]
    clean_stats, dirty_stats = make_learner("loss").update(batch, 0.3), make_learner("loss").update(dirty, 0.3)
    assert dirty_stats.gap.num_nonfinite == 1
    assert dirty_stats.gap.num_tokens == clean_stats.gap.num_tokens
    assert dirty_stats.policy_loss == pytest.approx(clean_stats.policy_loss, rel=0.02, abs=1e-3)


def test_nonfinite_step_is_skipped_then_stops_the_run(make_learner: MakeLearner) -> None:
    learner = make_learner(max_skipped_in_a_row=2)
    bad = [replace(s, advantage=float("nan")) for s in sequences(4)]
    before = learner.snapshot()
    assert learner.update(bad, 0.0).num_skipped == 1
    assert all(torch.equal(before[name], weight) for name, weight in learner.snapshot().items())
    assert learner.update(sequences(4), 0.0).num_skipped == 0
    learner.update(bad, 0.0)
    with pytest.raises(DivergedError, match=r"2 steps in a row.*Lower learner\.lr"):
        learner.update(bad, 0.0)


def test_several_updates_measure_staleness_apart(make_learner: MakeLearner) -> None:
    one, several = make_learner().update(sequences(16), 0.0), make_learner(updates_per_rollout=4, lr=1e-2).update(sequences(16), 0.0)
    assert one.gap.staleness_gap == 0.0
    assert several.gap.staleness_gap > 0.0
    assert several.gap.engine_gap == pytest.approx(one.gap.engine_gap, rel=0.02)


def test_snapshot_scores_are_those_of_the_older_weights(make_learner: MakeLearner) -> None:
    learner, batch = make_learner(lr=1e-2), as_sequences(sequences())
    snapshot, before = learner.snapshot(), learner.score(batch)
    learner.update(sequences(), 0.0)
    after = learner.score(batch)
    old = learner.score_snapshot(snapshot, batch)
    assert all((a.logps == b.logps).all() for a, b in zip(before, old, strict=True))
    assert all((a.logps == b.logps).all() for a, b in zip(after, learner.score(batch), strict=True))
    assert any((a.logps != b.logps).any() for a, b in zip(after, old, strict=True))


@pytest.mark.parametrize("stage", [0, 2])
def test_save_and_load_continue_exactly(make_learner: MakeLearner, tmp_path: Path, stage: int) -> None:
    straight = make_learner("grey_box", zero_stage=stage)
    straight.update(sequences(seed=1), 0.3)
    straight.save(tmp_path)
    expected = [straight.update(sequences(seed=seed), 0.3) for seed in (2, 3)]
    resumed = make_learner("grey_box", zero_stage=stage)
    resumed.load(tmp_path)
    assert [resumed.update(sequences(seed=seed), 0.3) for seed in (2, 3)] == expected
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(straight.named_tensors(), resumed.named_tensors(), strict=True))


def test_greedy_responses_are_the_argmax(make_learner: MakeLearner) -> None:
    learner, prompts = make_learner(), [(3, 4, 5), (7,), (9, 10)]
    responses = learner.greedy_responses(prompts, 5, (2,))
    for prompt, response in zip(prompts, responses, strict=True):
        assert 1 <= len(response) <= 5
        [score] = learner.score([TokenSequence((*prompt, *response), len(prompt))])
        assert (score.greedy_tokens == response).mean() >= 0.8  # a tie may fall either way in bf16


def test_missing_checkpoint(make_learner: MakeLearner, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no learner state"):
        make_learner().load(tmp_path)


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_short_attention_is_attention(length: int, num_kv_heads: int) -> None:
    """Value and gradients against torch's own, in fp32."""
    torch.manual_seed(0)
    shapes = [(3, 4, length, 8), (3, num_kv_heads, length, 8), (3, num_kv_heads, length, 8)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_(True) for tensor in ours]
    out, _ = short_causal_attention(torch.nn.Module(), *ours, attention_mask=None)
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-5)
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4)
