"""Routing replay: the engine's choice of experts, weighed by the learner's router, in every layout and pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from deploy_targets.errors import EngineError, PreflightError, ProfileError
from deploy_targets.routers import find_routers
from hetero_rl.algorithm.signals import grey_box_cost
from hetero_rl.commands import _opened
from hetero_rl.config import AlgorithmConfig, load_config
from hetero_rl.inputs import check_inputs
from hetero_rl.learner.batching import MicroBatch, micro_batches
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.learner.model import load_causal_lm
from hetero_rl.learner.policy import Beside, Policy
from hetero_rl.learner.routing import NO_ROUTE, replayed_weights, routed, router_agreement
from hetero_rl.run_folder import create_run
from hetero_rl.types import TrainSequence
from tests.conftest import TinyModels
from tests.learners import MakeLearner, as_sequences, grouped, quantizer_for, sequences

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 4, 2
REPLAY = AlgorithmConfig(routing_replay=True)
CPU = torch.device("cpu")


def random_routes(num_tokens: int, generator: np.random.Generator) -> np.ndarray:
    """int16 [num_tokens, NUM_LAYERS, TOP_K], different experts for each token."""
    return np.argsort(generator.random((num_tokens, NUM_LAYERS, NUM_EXPERTS)))[..., :TOP_K].astype(np.int16)


def with_routes(batch: list[TrainSequence], seed: int = 0) -> list[TrainSequence]:
    """Random ones; responses to one prompt took it by the same experts, but for the last response of the batch."""
    generator = np.random.default_rng(seed)
    of_prompt: dict[tuple[int, ...], np.ndarray] = {}
    routed_batch = []
    for i, sequence in enumerate(batch):
        prompt = of_prompt.setdefault(sequence.prompt, random_routes(len(sequence.prompt), generator))
        if i == len(batch) - 1:
            prompt = random_routes(len(sequence.prompt), generator)
        routes = np.concatenate([prompt, random_routes(len(sequence.tokens) - 1, generator)])
        routed_batch.append(replace(sequence, routes=routes))
    return routed_batch


def routes_of(batch: list[TrainSequence]) -> list[Any]:
    return [sequence.routes for sequence in batch]


def batches(batch: list[TrainSequence], *, packed: bool, max_tokens: int = 1000) -> Iterator[MicroBatch]:
    prompts, tokens = [s.prompt for s in batch], [s.tokens for s in batch]
    routes = None if batch[0].routes is None else routes_of(batch)
    return micro_batches(prompts, tokens, max_tokens, CPU, packed=packed, routes=routes)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_replayed_block_is_the_published_formula_and_so_is_its_gradient(normalized: bool) -> None:
    """Written out in float64: y = sum over the given experts of softmax(own logits) E(x)."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=6, num_experts=5, num_experts_per_tok=2, norm_topk_prob=normalized)
    block = Qwen3MoeSparseMoeBlock(config).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    given = torch.stack([torch.randperm(5)[:2] for _ in range(7)])
    with routed([block.gate], given[:, None], replay=True):
        out = block(x)
    direction = torch.randn_like(out)
    names, parameters = zip(*block.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad((out * direction).sum(), parameters), strict=True))

    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in block.named_parameters()}
    rows = []
    for token, experts in zip(x[0], given.tolist(), strict=True):
        scores = (copies["gate.weight"] @ token).exp()
        total = scores[experts].sum() if normalized else scores.sum()
        row = torch.zeros(8, dtype=torch.float64)
        for expert in experts:
            gate, up = (copies["experts.gate_up_proj"][expert] @ token).chunk(2)
            row = row + scores[expert] / total * (copies["experts.down_proj"][expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(row)
    expected = torch.stack(rows)
    assert torch.allclose(out[0], expected, rtol=1e-5, atol=1e-6)
    for name, gradient in zip(copies, torch.autograd.grad((expected * direction[0]).sum(), list(copies.values())), strict=True):
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-5), name
    assert float(gradients["gate.weight"].abs().max()) > 1e-2, "the learner's own router learns"
    assert not torch.allclose(block(x), out, atol=1e-2), "outside the block nothing is replayed"


def test_weights_of_the_routers_own_choice_are_its_own() -> None:
    logits = torch.randn(6, NUM_EXPERTS)
    top = logits.softmax(-1).topk(TOP_K)
    assert torch.equal(replayed_weights(logits, top.indices, normalized=False), top.values)
    assert torch.equal(replayed_weights(logits, top.indices, normalized=True), top.values / top.values.sum(-1, keepdim=True))


def test_agreement_is_a_matter_of_sets() -> None:
    """Of two layers: the first chooses the same two experts in another order, the second one other expert for the second token."""
    agreed: list[Tensor] = []
    for own, given in (([[0, 1], [2, 3]], [[1, 0], [3, 2]]), ([[0, 1], [2, 3]], [[0, 1], [2, 1]])):
        gate = torch.nn.Identity()
        with routed([gate], torch.tensor(given)[:, None], replay=False) as found:
            gate((torch.zeros(2, 4), torch.zeros(2, 2), torch.tensor(own)))
        agreed += found
    assert router_agreement(agreed, torch.tensor([1, 0, 1])).tolist() == [0.5, 1.0, 0.5]
    assert router_agreement([], torch.tensor([0])) is None


def test_batches_carry_the_routes_of_every_input_token() -> None:
    batch = with_routes(grouped())
    for packed in (True, False):
        seen = set()
        for micro in batches(batch, packed=packed, max_tokens=60):
            assert micro.routes is not None
            assert micro.routes.shape == (micro.input_ids.numel(), NUM_LAYERS, TOP_K)
            start = 0
            for index, length in zip(micro.indices, micro.lengths, strict=True):
                expected = batch[index].routes
                assert expected is not None
                places = micro.places[start : start + length]
                assert (micro.routes[places].numpy() == expected[len(batch[index].prompt) - 1 :]).all()
                seen.add(index)
                start += length
            own = (micro.routes != NO_ROUTE).all(-1).all(-1)
            assert packed <= bool(own.all()), "only padding has no route"
        assert len(seen) == len(batch)


def test_a_prompt_is_shared_only_by_those_that_took_it_the_same_way() -> None:
    batch = with_routes(grouped())
    [micro] = batches(batch, packed=True)
    prompts = {(s.prompt, s.routes[: len(s.prompt)].tobytes()) for s in batch if s.routes is not None}
    assert len(prompts) == len({s.prompt for s in batch}) + 1
    assert micro.input_ids.numel() == sum(len(prompt) for prompt, _ in prompts) + sum(len(s.tokens) - 1 for s in batch)


def own_routes(policy: Policy, micro: MicroBatch) -> Tensor:
    """What the learner's routers choose for `micro`, read by hooks of this test: int64 [num_tokens, NUM_LAYERS, TOP_K]."""
    chosen: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for router in find_routers(policy.lm):
            stack.callback(router.register_forward_hook(lambda module, inputs, output: chosen.append(output[2])).remove)
        policy(replace(micro, routes=None), 1.0)
    return torch.stack(chosen, dim=1)


@pytest.mark.parametrize("packed", [True, False])
def test_replay_of_the_learners_own_routes_changes_nothing(packed: bool, make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    policy = make_learner(folder=tiny_models("qwen3_moe"), algorithm=REPLAY).policy
    [micro] = batches(grouped(), packed=packed)
    own = own_routes(policy, micro)
    plain, replayed = policy(micro, 1.0), policy(replace(micro, routes=own), 1.0)
    assert torch.equal(plain.logp, replayed.logp)
    assert plain.router_agreement is None
    assert (replayed.router_agreement == 1).all()
    parameters = list(policy.lm.parameters())
    for a, b in zip(*(torch.autograd.grad(stats.logp.sum(), parameters) for stats in (plain, replayed)), strict=True):
        assert torch.equal(a, b)


def test_replay_of_other_routes_changes_the_log_probs_and_off_it_only_measures(make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    folder = tiny_models("qwen3_moe")
    replaying, measuring = make_learner(folder=folder, algorithm=REPLAY).policy, make_learner(folder=folder).policy
    [micro] = batches(grouped(), packed=True)
    own = own_routes(replaying, micro)
    other = replace(micro, routes=(own + 1) % NUM_EXPERTS)
    half = own.clone()
    half[:, 1] = (half[:, 1] + 1) % NUM_EXPERTS
    with torch.no_grad():
        plain = replaying(replace(micro, routes=None), 1.0).logp
        assert float((replaying(other, 1.0).logp - plain).abs().mean()) > 1e-2
        stats = measuring(other, 1.0)
        assert torch.equal(stats.logp, plain)
        assert (stats.router_agreement < 1).all()
        assert (measuring(replace(micro, routes=half), 1.0).router_agreement == 0.5).all()


def one_by_one(lm: Any, sequence: TrainSequence) -> np.ndarray:
    """Log-probs of the response along its routes, from a pass over this one sequence: no batch, no padding."""
    ids = torch.tensor([[*sequence.prompt, *sequence.tokens.tolist()]])
    with torch.no_grad(), routed(find_routers(lm), torch.from_numpy(sequence.routes).long(), replay=True):
        log_probs = lm(ids[:, :-1]).logits[0].log_softmax(-1)
    found: np.ndarray = log_probs.gather(1, ids[0, 1:, None])[len(sequence.prompt) - 1 :, 0].numpy()
    return found


@pytest.mark.parametrize("chunk_elements", [100, 1_000_000])
def test_packed_equals_padded_and_many_batches_equal_one(chunk_elements: int, tiny_models: TinyModels) -> None:
    """Log-probs, agreement, and the gradient of every parameter, in float32; with the logits kept, and recomputed in chunks."""
    lm = load_causal_lm(tiny_models("qwen3_moe")).float()
    policy, batch = Policy(lm, [], chunk_elements, routing_replay=True), with_routes(grouped())
    parameters = list(lm.parameters())
    weights = [np.sin(np.arange(len(s.tokens)) + 10.0 * i) for i, s in enumerate(batch)]
    results = []
    for packed, max_tokens in ((True, 1000), (True, 40), (False, 1000), (False, 40)):
        logps: dict[int, np.ndarray] = {}
        agreement: dict[int, np.ndarray] = {}
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for micro in batches(batch, packed=packed, max_tokens=max_tokens):
            stats = policy(micro, 1.0)
            logps |= dict(micro.unflatten(stats.logp.detach()))
            agreement |= dict(micro.unflatten(stats.router_agreement))
            for known, gradient in zip(
                total, torch.autograd.grad((stats.logp * micro.flatten(weights, CPU)).sum(), parameters), strict=True
            ):
                known += gradient
        order = range(len(batch))
        results.append((np.concatenate([logps[i] for i in order]), np.concatenate([agreement[i] for i in order]), total))
    (logp, agreed, gradient), *others = results
    assert 0 < agreed.mean() < 1
    np.testing.assert_allclose(logp, np.concatenate([one_by_one(lm, sequence) for sequence in batch]), atol=1e-5)
    for other_logp, other_agreed, other_gradient in others:
        np.testing.assert_allclose(other_logp, logp, atol=1e-5)
        np.testing.assert_array_equal(other_agreed, agreed)
        assert all(float((a - b).norm()) <= 1e-4 * float(b.norm()) for a, b in zip(other_gradient, gradient, strict=True))


def test_the_twin_replays_as_well(make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    """Alone and beside the learner: as a model whose weights are the rounded ones and that follows the same routes."""
    folder, batch = tiny_models("qwen3_moe"), with_routes(grouped())
    learner, quantizer = make_learner("grey_box", folder=folder, algorithm=REPLAY), quantizer_for(folder)
    [micro] = batches(batch, packed=True)
    with torch.no_grad():
        beside = learner.policy(micro, 1.0, Beside("kl"))
        plain_logits = learner.policy._logits(learner.policy._hidden(micro, as_twin=False)[0], 1.0, as_twin=False)
    as_twin = learner.score(as_sequences(batch), as_twin=True, routes=routes_of(batch))
    by_itself = learner.score(as_sequences(batch), as_twin=True)
    with torch.no_grad():
        for name, view in list(learner.named_tensors()):
            view.copy_(quantizer.dequantized(name, view))
        twin_logits = learner.policy._logits(learner.policy._hidden(micro, as_twin=False)[0], 1.0, as_twin=False)
    replaced = learner.score(as_sequences(batch), routes=routes_of(batch))
    assert all((a.logps == b.logps).all() for a, b in zip(as_twin, replaced, strict=True))
    assert max(np.abs(a.logps - b.logps).max() for a, b in zip(as_twin, by_itself, strict=True)) > 1e-2
    expected = grey_box_cost("kl", twin_logits.log_softmax(-1), plain_logits.log_softmax(-1), micro.targets)
    assert torch.allclose(beside.twin_cost, expected, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_update_replays_and_measures(stage: int, make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    learner = make_learner("grey_box", folder=tiny_models("qwen3_moe"), algorithm=REPLAY, zero_stage=stage, tokens_per_micro_batch=60)
    batch = with_routes(sequences())
    replayed = np.concatenate([score.logps for score in learner.score(as_sequences(batch), routes=routes_of(batch))])
    engine = np.concatenate([s.engine_logp for s in batch])
    stats = learner.update(batch, 0.3)
    assert stats.num_skipped == 0
    assert stats.sums.gap.mean(stats.sums.gap.engine_gap) == pytest.approx(np.abs(np.exp(replayed) - np.exp(engine)).mean(), rel=0.02)
    assert 0 < stats.sums.router_agreement < 1


def test_old_log_probs_are_replayed_too(make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    learner = make_learner(folder=tiny_models("qwen3_moe"), algorithm=REPLAY)
    batch = with_routes(sequences())
    expected = learner.score(as_sequences(batch), routes=routes_of(batch))
    own = learner.score(as_sequences(batch))
    snapshot = learner.score_snapshot(learner.snapshot(), as_sequences(batch), routes_of(batch))
    for filled, score, by_snapshot in zip(learner._with_old_logp(batch), expected, snapshot, strict=True):
        assert filled.learner_old_logp is not None
        assert (filled.learner_old_logp == score.logps).all()
        assert (by_snapshot.logps == score.logps).all()
    assert max(np.abs(a.logps - b.logps).max() for a, b in zip(expected, own, strict=True)) > 1e-2


def test_agreement_is_measured_without_replay_and_unknown_without_routes(make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    learner = make_learner(folder=tiny_models("qwen3_moe"))
    told = learner.update(with_routes(sequences()), 0.0).sums
    assert 0 < told.router_agreement < 1
    untold = learner.update(sequences(), 0.0).sums
    assert np.isnan(untold.router_agreement)


def test_routes_that_are_missing_or_of_another_model_are_an_error(make_learner: MakeLearner, tiny_models: TinyModels) -> None:
    def updated(learner: Learner, **change: Any) -> None:
        batch = with_routes(sequences())
        learner.update([*batch[1:], replace(batch[0], **change)], 0.0)

    replaying, dense = make_learner(folder=tiny_models("qwen3_moe"), algorithm=REPLAY), make_learner()
    num_inputs = len(sequences()[0].prompt) + len(sequences()[0].tokens) - 1
    with pytest.raises(EngineError, match="1 of 12 responses came without routes"):
        updated(replaying, routes=None)
    with pytest.raises(EngineError, match="2 layers of 4 experts, 2 for each token"):
        updated(replaying, routes=np.zeros((num_inputs, 3, TOP_K), np.int16))
    with pytest.raises(EngineError, match="through experts 4 to 4"):
        updated(replaying, routes=np.full((num_inputs, NUM_LAYERS, TOP_K), 4, np.int16))
    with pytest.raises(EngineError, match="0 layers"):
        updated(dense)


def test_replay_is_refused_where_it_cannot_be_had(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Every reason at once: the engine, and the model."""

    def refused(target: str, folder: Path) -> list[str]:
        config, profile = load_config([], [f"model.path={folder}", "algorithm.routing_replay=true"], target)
        with pytest.raises(PreflightError) as caught:
            check_inputs(config, profile)
        return [line for line in caught.value.offenders if line.startswith("algorithm.routing_replay: ")]

    other = Path(shutil.copytree(tiny_models("qwen3_moe"), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "olmoe"}))
    engine, model = refused("fake", tiny_models("qwen3"))
    assert "engine 'fake' returns no routes; the engines that do: transformers" in engine
    assert "'qwen3' has no experts" in model
    [line] = refused("bf16-transformers", other)
    assert "the routes of model_type 'olmoe' are not known here" in line
    [line] = refused("bf16-vllm", tiny_models("qwen3_moe"))
    assert "'vllm' returns no routes" in line


def test_an_export_for_another_target_asks_for_no_routes(tiny_models: TinyModels, tmp_path: Path) -> None:
    config, profile = load_config([], [f"model.path={tiny_models('qwen3_moe')}", "algorithm.routing_replay=true"], "bf16-transformers")
    create_run(tmp_path / "run", config, profile)
    _, own, _, same = _opened(tmp_path / "run", None)
    assert (own.algorithm.routing_replay, same) == (True, True)
    _, other, target, same = _opened(tmp_path / "run", "bf16-vllm")
    assert (other.algorithm.routing_replay, other.target.name, target.name, same) == (False, "bf16-vllm", "bf16-vllm", False)


def test_a_gate_cannot_judge_by_routes_that_nobody_gives() -> None:
    with pytest.raises(ProfileError, match=r"cannot be had with algorithm\.routing_replay"):
        load_config([], ["algorithm.routing_replay=true", "loop.publish_gate=1.1"])
