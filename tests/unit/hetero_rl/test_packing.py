"""Packed micro-batches: prompts shared by their responses, the same numbers as with a row per sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy_targets.errors import UsageError
from hetero_rl.algorithm.kinds import DEFAULT_BOUNDS
from hetero_rl.config import ConstraintConfig
from hetero_rl.learner import attention
from hetero_rl.learner.batch_parts import split_batch
from hetero_rl.learner.batching import micro_batches
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.learner.model import check_head, load_causal_lm
from hetero_rl.learner.policy import Beside
from hetero_rl.types import TrainSequence
from tests.learners import MakeLearner, as_sequences, grouped, sequences
from tests.models import tiny_model


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


def special_shapes() -> list[TrainSequence]:
    """One-token responses alone, a prompt that begins another, a long prompt beside short ones, a sequence too long to pack."""
    batch = grouped()
    one, other = batch[0], batch[-1]
    beginning = replace(one, prompt=(*other.prompt, 7))
    long_prompt = tuple(range(3, 33)) * 5
    return [
        *(replace(s, prompt=(5, 6), tokens=s.tokens[:1], engine_logp=s.engine_logp[:1]) for s in batch[:3]),
        *(beginning, other, replace(one, prompt=long_prompt), replace(other, prompt=long_prompt)),
        *sequences(2, seed=9, longest=3),
        TrainSequence(long_prompt, np.arange(300, dtype=np.int32) % 27 + 3, np.full(300, -3.0, np.float32), 0.7),
    ]


def gradients(learner: Learner, batch: list[TrainSequence], packed: bool) -> dict[str, torch.Tensor]:
    """Of a sum over all response tokens in which each has a weight of its own."""
    parameters = dict(learner.policy.lm.named_parameters())
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    weights = [np.sin(np.arange(len(s.tokens)) + 10.0 * i) for i, s in enumerate(batch)]
    for micro in micro_batches([s.prompt for s in batch], [s.tokens for s in batch], 200, torch.device("cpu"), packed=packed):
        stats = learner.policy(micro, 1.0, Beside("kl", ("none", DEFAULT_BOUNDS["none"])))
        loss = ((stats.logp + stats.twin_cost + stats.mean_score) * micro.flatten(weights, torch.device("cpu"))).sum()
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += gradient.float()
    return total


@pytest.mark.parametrize(("compute_dtype", "tolerance"), [("float32", 0.01), ("bfloat16", 0.06)])
@pytest.mark.parametrize("shapes", [grouped, special_shapes])
def test_packed_equals_padded(
    make_learner: MakeLearner, compute_dtype: str, tolerance: float, shapes: Callable[[], list[TrainSequence]]
) -> None:
    """The same log-probs, and the same gradient of every parameter, with prompts shared and with a row per sequence."""
    learner, batch = make_learner("grey_box", tokens_per_micro_batch=200, compute_dtype=compute_dtype), shapes()
    assert learner.packed
    scores = []
    for packed in (True, False):
        learner.packed = packed
        scores.append(np.concatenate([score.logps for score in learner.score(as_sequences(batch))]))
    assert np.abs(scores[0] - scores[1]).max() < (1e-4 if compute_dtype == "float32" else 0.05)
    together, apart = gradients(learner, batch, True), gradients(learner, batch, False)
    for name, gradient in apart.items():
        assert (together[name] - gradient).norm() < tolerance * gradient.norm(), name


def test_attention_padding_is_bounded() -> None:
    """One long prompt beside many short ones, and one prompt with many short responses, do not blow the attention up."""
    long_one = replace(sequences(1)[0], prompt=tuple(range(3, 33)) * 8)
    batch = [long_one] * 64 + [replace(s, prompt=(3 + i % 20, 4)) for i, s in enumerate(sequences(200, longest=2))]
    for micro in micro_batches([s.prompt for s in batch], [s.tokens for s in batch], 500, torch.device("cpu"), packed=True):
        assert micro.packing is not None
        assert all(rows.keys.numel() <= 4 * 500 for rows in micro.packing.rows)


class Leaky(torch.nn.Module):
    """Mixes neighbouring tokens, as a convolution does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + hidden.roll(1, dims=1)


def test_a_model_that_mixes_tokens_elsewhere_is_not_packed(model_dir: Path) -> None:
    lm = load_causal_lm(model_dir)
    assert attention.follows_packing(lm)
    lm.model.norm = torch.nn.Sequential(lm.model.norm, Leaky())
    assert not attention.follows_packing(lm)


def test_maths_after_the_head_is_refused(model_dir: Path) -> None:
    lm = load_causal_lm(model_dir)
    check_head(lm)
    lm.register_forward_hook(lambda module, args, output: output.__class__(logits=1.5 * output.logits))
    with pytest.raises(UsageError, match="after the output head"):
        check_head(lm)


def test_sequences_without_a_gradient_are_measured_all_the_same(make_learner: MakeLearner) -> None:
    """An advantage of 0 saves the backward pass and changes no number; next to nothing, which keeps it, is the same."""
    updates = []
    for almost in (0.0, 1e-30):
        batch = [replace(s, advantage=almost) if i % 3 else s for i, s in enumerate(grouped())]
        learner = make_learner("loss")
        assert [len(part.sequences) for part in split_batch(batch, learner.constraint, 0.0, 0)] == ([5, 10] if almost == 0.0 else [15])
        assert [len(part.sequences) for part in split_batch(batch, learner.constraint, 0.1, 0)] == [15]
        updates.append(learner.update(batch, 0.0))
    saved, whole = updates
    assert saved.sums.gap.num_tokens == whole.sums.gap.num_tokens
    assert saved.grad_norm == pytest.approx(whole.grad_norm, rel=1e-3)
    for field in ("policy_loss", "entropy_nats", "cost"):
        assert getattr(saved.sums, field) == pytest.approx(getattr(whole.sums, field), rel=1e-3), field


def test_a_share_of_the_prompts_takes_turns_in_the_grey_box() -> None:
    batch = grouped()
    config = ConstraintConfig(grey_box_share=0.4)
    prompts = {s.prompt for s in batch}
    turns: list[set[tuple[int, ...]]] = []
    for num_updates in range(5):
        parts = split_batch(batch, config, 0.3, num_updates)
        assert sum(len(part.sequences) for part in parts) == len(batch)
        paired = next(part for part in parts if part.grey_box)
        assert paired.cost_scale == 2.5
        turns.append({s.prompt for s in paired.sequences})
        assert len(turns[-1]) == 2, "0.4 of five prompts"
        assert all(s.prompt not in turns[-1] for part in parts if part is not paired for s in part.sequences)
    assert set.union(*turns) == prompts
    assert split_batch(batch, config, 0.0, 0)[0].grey_box is None, "lambda 0 runs no twin"


def test_a_batch_without_any_advantage_still_takes_its_step(make_learner: MakeLearner) -> None:
    update = make_learner().update([replace(s, advantage=0.0) for s in grouped()], 0.0)
    assert update.grad_norm == 0.0
    assert update.num_skipped == 0


def test_models_whose_attention_cannot_be_told_are_not_packed(tmp_path: Path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    assert not attention.follows_packing(load_causal_lm(tiny_model("qwen2", tmp_path, extra_config=sliding)))
