"""The DeepSpeed learner: its numbers are those of plain PyTorch, however a batch is cut, at every ZeRO stage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy_targets.catalog import make_quantizer
from deploy_targets.errors import UsageError
from deploy_targets.profile import load_profile
from deploy_targets.quantizers.kv_cache import cache_rounding, cut_float8
from deploy_targets.quantizers.none import NoQuantizer
from deploy_targets.types import TokenSequence
from hetero_rl.algorithm.kinds import DEFAULT_BOUNDS
from hetero_rl.config import AlgorithmConfig, ConstraintConfig
from hetero_rl.errors import DivergedError
from hetero_rl.learner.attention import short_causal_attention
from hetero_rl.learner.batch_parts import split_batch
from hetero_rl.learner.batching import micro_batches
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.learner.fake_quant import add_twin, random_errors, twin
from hetero_rl.learner.model import load_causal_lm
from hetero_rl.learner.policy import Beside
from tests.conftest import TinyModels
from tests.learners import MakeLearner, as_sequences, quantizer_for, sequences


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


@pytest.mark.parametrize("signal", ["off", "grey_box"])
def test_twin_computes_with_the_targets_weights(signal: str, make_learner: MakeLearner, model_dir: Path) -> None:
    """The twin equals a model whose weights were really replaced by the dequantized ones, exactly; only the grey box keeps those."""
    learner, quantizer, batch = make_learner(signal), quantizer_for(model_dir), as_sequences(sequences())
    twin_scores = learner.score(batch, as_twin=True)
    assert [layer._rounded is None for layer in learner.twins] == [signal == "off"] * len(learner.twins)
    plain_scores = learner.score(batch)
    with torch.no_grad():
        for name, parameter in learner.policy.lm.named_parameters():
            if quantizer.quantizes(name):
                parameter.copy_(quantizer.dequantized(name, parameter))
    replaced = learner.score(batch)
    assert all((a.logps == b.logps).all() for a, b in zip(twin_scores, replaced, strict=True))
    assert max(np.abs(a.logps - b.logps).max() for a, b in zip(twin_scores, plain_scores, strict=True)) > 1e-3


def test_a_twin_rounds_its_inputs_where_the_kernels_do(model_dir: Path) -> None:
    """W8A8: product of the rounded inputs and the rounded weight, the gradient as if nothing were rounded."""
    profile = load_profile("int8-vllm")
    quantizer = make_quantizer(profile, model_dir)
    lm = load_causal_lm(model_dir)
    layers = add_twin(lm, quantizer)
    layer = lm.model.layers[0].mlp.down_proj
    inputs = torch.randn(5, layer.in_features, requires_grad=True)
    name = "model.layers.0.mlp.down_proj.weight"
    with twin(layers):
        out = layer(inputs)
    expected = quantizer.rounded_inputs(name, inputs.detach()) @ quantizer.dequantized(name, layer.weight).float().t()
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, layer(inputs), atol=1e-3)
    out.sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, quantizer.dequantized(name, layer.weight).detach().float().sum(0).expand(5, -1))


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
    num_tokens = whole.sums.gap.num_tokens
    assert cut.sums.gap.num_tokens == num_tokens
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=0.03, abs=2e-3)
    for field in ("policy_loss", "cost", "entropy_nats"):
        assert getattr(cut.sums, field) / num_tokens == pytest.approx(getattr(whole.sums, field) / num_tokens, rel=0.03, abs=2e-3), field


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_agree(make_learner: MakeLearner, stage: int) -> None:
    reference = make_learner("grey_box")
    sharded = make_learner("grey_box", zero_stage=stage)
    for _ in range(2):
        expected, got = reference.update(sequences(), 0.3).sums, sharded.update(sequences(), 0.3).sums
        assert got.mean(got.policy_loss) == pytest.approx(expected.mean(expected.policy_loss), rel=0.02, abs=2e-3)
        assert got.mean(got.cost) == pytest.approx(expected.mean(expected.cost), rel=0.02, abs=2e-3)
    for (name, a), (other, b) in zip(reference.named_tensors(), sharded.named_tensors(), strict=True):
        assert name == other
        assert a.shape == b.shape
        assert torch.allclose(a.float(), b.float(), atol=0.02)


@pytest.mark.parametrize(("stage", "offload_weights"), [(1, False), (2, False), (3, False), (3, True)])
def test_offload_changes_where_and_not_what(make_learner: MakeLearner, tmp_path: Path, stage: int, offload_weights: bool) -> None:
    """Optimizer state and weights kept elsewhere; a resume by bits. ZeRO 1 and 2 sum the gradient's norm in another order."""
    here = make_learner("grey_box", zero_stage=stage)
    moved = make_learner("grey_box", zero_stage=stage, offload="cpu", offload_weights=offload_weights)
    assert moved.update(sequences(), 0.3).sums == here.update(sequences(), 0.3).sums
    moved.save(tmp_path)
    expected = here.update(sequences(seed=1), 0.3).sums
    assert moved.update(sequences(seed=1), 0.3).sums == expected
    resumed = make_learner("grey_box", zero_stage=stage, offload="cpu", offload_weights=offload_weights)
    resumed.load(tmp_path)
    assert resumed.update(sequences(seed=1), 0.3).sums == expected
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(moved.named_tensors(), resumed.named_tensors(), strict=True))
    others = torch.cat([(a != b).flatten().float() for (_, a), (_, b) in zip(here.named_tensors(), moved.named_tensors(), strict=True)])
    assert others.mean() < (0.01 if stage < 3 else 1e-9)


@pytest.mark.variant
@pytest.mark.parametrize("offload_weights", [False, True])
def test_a_disk_changes_where_and_not_what(make_learner: MakeLearner, tmp_path: Path, offload_weights: bool) -> None:
    """The same bits; but a load gives those of the start, which is why a resume is refused. Once that fails, it need not be."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio-dev, to compile what reads disks")

    def on_a_disk(name: str) -> Learner:
        (tmp_path / name).mkdir()
        return make_learner("grey_box", zero_stage=3, offload="nvme", nvme_path=tmp_path / name, offload_weights=offload_weights)

    here, moved = make_learner("grey_box", zero_stage=3), on_a_disk("first")
    start = [tensor.clone() for _, tensor in here.named_tensors()]
    for seed in (0, 1):
        assert moved.update(sequences(seed=seed), 0.3).sums == here.update(sequences(seed=seed), 0.3).sums
    trained = [tensor.clone() for _, tensor in moved.named_tensors()]
    assert all(torch.equal(a, b) for a, (_, b) in zip(trained, here.named_tensors(), strict=True))
    moved.save(tmp_path / "saved")
    loaded = on_a_disk("second")
    loaded.load(tmp_path / "saved")
    found = [tensor.clone() for _, tensor in loaded.named_tensors()]
    assert all(torch.equal(a, b) for a, b in zip(found, start, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found, trained, strict=True))


def test_a_publish_under_zero_3_gathers_one_tensor_at_a_time(make_learner: MakeLearner) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    learner = make_learner(zero_stage=3)
    parameters = dict(learner.policy.lm.named_parameters())

    def whole() -> set[str]:
        return {name for name, parameter in parameters.items() if parameter.ds_status is ZeroParamStatus.AVAILABLE}

    before = whole()
    gathered = [whole() - before for _ in learner.named_tensors()]
    assert max(map(len, gathered)) == 1
    assert set().union(*gathered) == parameters.keys() - before
    assert len(before) < len(parameters) / 2
    assert whole() == before


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
    costs = [learner.update(batch, 1.0).sums.cost for _ in range(12)]
    assert costs[-1] < 0.9 * costs[0]


def test_an_update_takes_the_rounding_of_the_proof_before_it(make_learner: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are rounded once between two updates: the twin costs an update passes, and no rounding."""
    learner, rounded = make_learner("grey_box"), []
    quantizer = learner.twins[0].quantizer
    original = quantizer.dequantized

    def counted(name: str, weight: torch.Tensor) -> torch.Tensor:
        rounded.append(name)
        return original(name, weight)

    monkeypatch.setattr(quantizer, "dequantized", counted)
    for _ in range(2):
        rounded.clear()
        learner.score(as_sequences(sequences(2)), as_twin=True)
        learner.update(sequences(), 0.3)
        assert sorted(rounded) == sorted(layer.weight_name for layer in learner.twins)


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
    clean_sums, dirty_sums = clean_stats.sums, dirty_stats.sums
    assert dirty_sums.gap.num_nonfinite == 1
    assert dirty_sums.gap.num_tokens == clean_sums.gap.num_tokens
    assert dirty_sums.policy_loss == pytest.approx(clean_sums.policy_loss, rel=0.02, abs=1e-3 * clean_sums.gap.num_tokens)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_nonfinite_step_is_skipped_then_stops_the_run(zero_stage: int, make_learner: MakeLearner) -> None:
    learner = make_learner(max_skipped_in_a_row=2, zero_stage=zero_stage)
    bad = [replace(s, advantage=float("nan")) for s in sequences(4)]
    before = dict(learner.named_tensors()) if zero_stage == 3 else learner._copied()
    assert learner.update(bad, 0.0).num_skipped == 1
    after = dict(learner.named_tensors()) if zero_stage == 3 else learner._copied()
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert learner.update(sequences(4), 0.0).num_skipped == 0
    learner.update(bad, 0.0)
    with pytest.raises(DivergedError, match=r"2 optimizer steps in a row.*loss or gradient was not finite.*Lower learner\.lr"):
        learner.update(bad, 0.0)


def test_nan_of_one_update_costs_the_others_of_a_step_nothing(make_learner: MakeLearner) -> None:
    learner = make_learner(updates_per_rollout=4)
    batch = sequences(12)
    stats = learner.update([replace(batch[0], advantage=float("nan")), *batch[1:]], 0.0)
    assert stats.num_skipped == 1
    assert all(torch.isfinite(weight).all() for weight in learner._copied().values())


def test_nan_of_the_twin_stops_the_step_alone(make_learner: MakeLearner) -> None:
    learner = make_learner("grey_box", max_skipped_in_a_row=3)
    learner.update(sequences(4), 0.3)
    before = learner._copied()
    layer = learner.twins[0]
    layer._rounded = torch.full_like(layer.weight, float("nan"))
    assert learner.update(sequences(4), 0.3).num_skipped == 1
    assert all(torch.equal(before[name], now) for name, now in learner._copied().items())
    assert learner.update(sequences(4), 0.3).num_skipped == 0, "the twin is rounded anew"


def test_several_updates_measure_staleness_apart(make_learner: MakeLearner) -> None:
    one, several = make_learner().update(sequences(16), 0.0), make_learner(updates_per_rollout=4, lr=1e-2).update(sequences(16), 0.0)
    assert one.sums.gap.staleness_gap == 0.0
    assert several.sums.gap.staleness_gap > 0.0
    assert several.sums.gap.engine_gap == pytest.approx(one.sums.gap.engine_gap, rel=0.02)


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


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_restored_masters_undo_a_step(make_learner: MakeLearner, stage: int) -> None:
    """To the last bit of the fp32 weights: the step after it starts from them, whatever bf16 shows of them."""
    learner = make_learner(zero_stage=stage)
    learner.update(sequences(), 0.0)
    learner.keep_masters()
    weights, masters, scores = learner._copied(), learner._masters, learner.score(as_sequences(sequences()))
    assert all(masters[name].dtype == torch.float32 for name in masters)
    assert any(not torch.equal(masters[name], weights[name].float()) for name in masters), "masters hold more digits"
    learner.update(sequences(), 0.0)
    assert any(not torch.equal(weights[name], tensor) for name, tensor in learner._copied().items())
    learner.restore_masters()
    assert all(torch.equal(weights[name], tensor) for name, tensor in learner._copied().items())
    learner.keep_masters()
    assert all(torch.equal(masters[name], tensor) for name, tensor in learner._masters.items())
    assert all((a.logps == b.logps).all() for a, b in zip(scores, learner.score(as_sequences(sequences())), strict=True))


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


def test_a_learner_that_learns_as_the_twin(make_learner: MakeLearner) -> None:
    """Its scores, losses and gaps are the twin's; the grey box then pulls on the bf16 weights beside it."""
    plain, fake = make_learner(), make_learner(forward="fake_quant")
    batch = as_sequences(sequences())
    twin_scores = plain.score(batch, as_twin=True)
    assert all((a.logps == b.logps).all() for a, b in zip(fake.score(batch), twin_scores, strict=True))
    on_engine = [replace(s, engine_logp=score.logps) for s, score in zip(sequences(), twin_scores, strict=True)]
    assert fake.update(on_engine, 0.0).sums.gap.engine_gap < 1e-3 < plain.update(on_engine, 0.0).sums.gap.engine_gap
    beside = make_learner("grey_box", forward="fake_quant").update(sequences(), 0.3).sums
    alone = make_learner("grey_box").update(sequences(), 0.3).sums
    assert beside.cost == pytest.approx(alone.cost, rel=0.02), "the same two sides, whichever learns"


def test_correction_weights_are_counted(make_learner: MakeLearner) -> None:
    def share(kind: str, **bounds: float) -> float:
        algorithm = AlgorithmConfig.model_validate({"correction": kind, **bounds})
        return make_learner(algorithm=algorithm).update(sequences(), 0.0).sums.effective_share

    assert share("none") == pytest.approx(1.0)
    assert 0.0 < share("tis") < 1.0
    assert share("mis", correction_low=1e6, correction_high=1e7) == 0.0, "every token was dropped"


@pytest.mark.parametrize("normalization", ["token", "sequence", "dr"])
def test_the_normalized_loss_does_not_depend_on_the_cut(normalization: str, make_learner: MakeLearner) -> None:
    """On-policy, the policy loss of a token is -A; the tokens of a response count by the normalization."""
    algorithm = AlgorithmConfig.model_validate({"normalization": normalization})
    batch = sequences()
    lengths = np.array([len(s.tokens) for s in batch])
    advantage = np.array([s.advantage for s in batch])
    mean = {
        "token": (-advantage * lengths).sum() / lengths.sum(),
        "sequence": -advantage.mean(),
        "dr": (-advantage * lengths).sum() / (len(batch) * 9),
    }[normalization]
    whole = make_learner(algorithm=algorithm).update(batch, 0.0)
    cut = make_learner(algorithm=algorithm, tokens_per_micro_batch=32).update(batch, 0.0)
    for stats in (whole, cut):
        assert stats.sums.mean(stats.sums.policy_loss) == pytest.approx(mean, rel=1e-4)
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=0.03)


def test_score_centering_is_the_drift_towards_the_twin(make_learner: MakeLearner) -> None:
    """The term and its gradient are those of E_twin[log p], the twin held constant."""
    generator = np.random.default_rng(0)
    prompts = [tuple(generator.integers(3, 30, 5).tolist()) for _ in range(8)]
    policy, device = make_learner().policy, torch.device("cpu")
    [micro] = micro_batches(prompts, [[3]] * 8, 1000, device, packed=False)
    with torch.no_grad():
        twin_logp = policy._logits(policy._hidden(micro, as_twin=True)[0], 1.0, as_twin=True).log_softmax(-1)
    stats = policy(micro, 1.0, Beside(None, ("none", DEFAULT_BOUNDS["none"])))
    logits = policy._logits(policy._hidden(micro, as_twin=False)[0], 1.0, as_twin=False)
    expected = (twin_logp.exp() * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(stats.mean_score, expected, rtol=1e-3, atol=1e-3)
    weights = [p for _, p in policy.lm.named_parameters()]
    for a, b in zip(torch.autograd.grad(stats.mean_score.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4 + 0.05 * float(b.float().abs().max()))


@pytest.mark.parametrize("loss", ["gspo", "cispo", "dppo"])
def test_every_loss_takes_steps(loss: str, make_learner: MakeLearner) -> None:
    algorithm = AlgorithmConfig.model_validate({"loss": loss})
    learner = make_learner(algorithm=algorithm, updates_per_rollout=2)
    before = learner._copied()
    stats = learner.update(sequences(), 0.0)
    assert stats.num_skipped == 0
    assert stats.grad_norm > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in learner._copied().items())


def test_a_cache_of_few_bits(make_learner: MakeLearner) -> None:
    """The twin reads keys and values as the cache holds them, packed and padded alike; the learner does not."""
    rounding = cache_rounding(load_profile("bf16-vllm-fp8kv"))
    assert rounding is not None
    batch = as_sequences(sequences())
    learner, plain = make_learner("grey_box", cache_rounding=rounding, compute_dtype="float32"), make_learner(compute_dtype="float32")
    assert learner.has_twin
    found = []
    for packed in (True, False):
        learner.packed = plain.packed = packed
        found.append(np.concatenate([score.logps for score in learner.score(batch, as_twin=True)]))
    assert np.abs(found[0] - found[1]).max() < 1e-4
    without = np.concatenate([score.logps for score in plain.score(batch, as_twin=True)])
    assert 1e-3 < np.abs(found[0] - without).mean() < 0.5
    unrounded = (np.concatenate([score.logps for score in each.score(batch)]) for each in (learner, plain))
    assert np.array_equal(*unrounded)


@pytest.mark.parametrize("length", [12, 150])
def test_attention_over_a_rounded_cache(length: int) -> None:
    """Values and straight-through gradients are those of torch's attention over what the cache gives back."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 4, length, 16, generator=generator) for _ in range(3))
    rounding = partial(cut_float8, dtype="float8_e4m3fn")
    ours, theirs = ([t.clone().requires_grad_(True) for t in (query, key, value)], [query.clone(), rounding(key), rounding(value)])
    for tensor in theirs:
        tensor.requires_grad_(True)
    module = torch.nn.Module()
    module.is_causal = True
    out, _ = short_causal_attention(module, *ours, None, cache_rounding=rounding)
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-3)


def test_flatness_is_the_grey_box_with_random_errors(make_learner: MakeLearner, model_dir: Path) -> None:
    """Errors of the rounding's size at signs drawn anew for each update; what the twin is elsewhere stays."""
    learner, quantizer = make_learner("flatness"), quantizer_for(model_dir)
    layer = learner.twins[0]
    weight = layer.weight.detach().clone()
    error = quantizer.dequantized(layer.weight_name, weight) - weight
    drawn = []
    for seed in (1, 1, 2):
        with random_errors(learner.twins, seed), twin(learner.twins):
            drawn.append(layer.active_weight().detach() - weight)
    for noise in drawn:
        torch.testing.assert_close(noise.abs().float(), error.abs().float(), rtol=0.0, atol=float(weight.abs().max()) / 128)  # bf16
        assert 0.4 < (noise.sign() == error.sign()).float().mean() < 0.6 + float((error == 0).float().mean())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    batch, before = as_sequences(sequences()), make_learner("grey_box")
    learner.update(sequences(), 0.0), before.update(sequences(), 0.0)
    pairs = zip(learner.score(batch, as_twin=True), before.score(batch, as_twin=True), strict=True)
    assert all((ours.logps == theirs.logps).all() for ours, theirs in pairs), "the proof's twin is the target's"


def test_flatness_pulls_on_both_sides_and_repeats_itself(make_learner: MakeLearner) -> None:
    """Its cost differs from the grey box's, is positive, moves the weights, and is the same in the same update of the same run."""
    once, again, grey = (make_learner(signal).update(sequences(), 0.3) for signal in ("flatness", "flatness", "grey_box"))
    assert once.sums.cost == again.sums.cost > 0.0
    assert once.grad_norm == again.grad_norm
    assert 0.2 < once.sums.cost / grey.sums.cost < 5.0
    assert once.sums.cost != grey.sums.cost


def test_a_snapshot_leaves_the_rounded_weights_of_now(make_learner: MakeLearner) -> None:
    """A learner that computes with rounded weights rounds anew after it scored those of an older version."""
    learner, batch = make_learner(forward="fake_quant", lr=1e-2), as_sequences(sequences())
    snapshot = learner.snapshot()
    learner.update(sequences(), 0.0)
    before = learner.score(batch)
    old = learner.score_snapshot(snapshot, batch)
    assert all((a.logps == b.logps).all() for a, b in zip(learner.score(batch), before, strict=True))
    assert any((a.logps != b.logps).any() for a, b in zip(old, before, strict=True))


def test_a_step_without_a_single_finite_logprob_moves_nothing(make_learner: MakeLearner) -> None:
    learner = make_learner(lr=1e-2)
    learner.update(sequences(), 0.0)
    before = learner._copied()
    lost = learner.update([replace(s, engine_logp=np.full_like(s.engine_logp, np.nan)) for s in sequences()], 0.0)
    assert lost.num_skipped == 1
    assert all(torch.equal(before[name], now) for name, now in learner._copied().items())


def test_steps_without_log_probs_in_a_row_blame_the_engine(make_learner: MakeLearner) -> None:
    lost = [replace(s, engine_logp=np.full_like(s.engine_logp, np.nan)) for s in sequences(3)]
    with pytest.raises(DivergedError, match="the engine gave no finite log-prob for any sampled token"):
        make_learner(max_skipped_in_a_row=1).update(lost, 0.0)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"forward": "fake_quant"}, r"learner\.forward = 'fake_quant'"),
        ({"algorithm": AlgorithmConfig(score_centering=True)}, r"algorithm\.score_centering = true"),
    ],
)
def test_a_target_that_rounds_nothing_has_no_twin(options: dict[str, object], asked: str, make_learner: MakeLearner) -> None:
    with pytest.raises(UsageError, match=rf"{asked} needs the target's rounding, and this target rounds nothing"):
        make_learner(quantizer=NoQuantizer(load_profile("bf16-vllm").scheme, {}), **options)


def test_a_share_of_the_prompts_costs_as_much_in_the_mean(make_learner: MakeLearner) -> None:
    """Also where an update's turn brings no prompt at all; and what is logged is in the unit of the whole."""
    batch = sequences(3)
    whole = split_batch(batch, ConstraintConfig(), 1.0, 0)[0]
    assert whole.cost_scale == 1.0
    few = ConstraintConfig(grey_box_share=0.25)
    counts = [
        sum(len(part.sequences) * part.cost_scale for part in split_batch(batch, few, 1.0, turn) if part.grey_box) for turn in range(8)
    ]
    assert sum(counts) / 8 == pytest.approx(len(batch))
    assert min(counts) < max(counts)
