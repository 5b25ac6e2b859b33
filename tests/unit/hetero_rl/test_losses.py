"""Every policy loss against a loop over its definition in float64, its gradient against autograd and against the score function."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hetero_rl.algorithm.kinds import DEFAULT_CLIPS, POLICY_LOSSES, ClipRange, PolicyLoss
from hetero_rl.algorithm.losses import policy_loss, response_scales
from hetero_rl.algorithm.segments import Segments

Array = NDArray[np.float64]
LENGTHS = [4, 1, 7]
CLIP = ClipRange(0.15, 0.25)


def reference(
    kind: PolicyLoss, logp: Array, old: Array, engine: Array, advantage: Array, weight: Array, mask: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """The table of losses.py, one token after the other, from probabilities."""
    losses, stopped, start = np.zeros(len(logp)), np.zeros(len(logp)), 0
    for length in LENGTHS:
        tokens = range(start, start + length)
        ratios = [math.exp(logp[t]) / math.exp(old[t]) for t in tokens if mask[t]]
        geometric = math.prod(ratios) ** (1 / max(1, len(ratios)))
        for t in tokens:
            a, w = advantage[t], weight[t]
            ratio = geometric if kind == "gspo" else math.exp(logp[t]) / math.exp(old[t])
            cut = min(max(ratio, 1 - CLIP.low), 1 + CLIP.high)
            if kind == "dppo":
                shift = math.exp(logp[t]) - math.exp(engine[t])
                stopped[t] = (shift > CLIP.high and a > 0) or (shift < -CLIP.low and a < 0)
                losses[t] = 0.0 if stopped[t] else -a * min(math.exp(logp[t]) / math.exp(engine[t]), 20.0) * logp[t]
            elif kind == "cispo":
                stopped[t], losses[t] = cut != ratio, -w * cut * a * logp[t]
            else:
                stopped[t], losses[t] = cut * a < ratio * a, -w * min(ratio * a, cut * a)
        start += length
    return losses, stopped


def inputs(seed: int) -> tuple[Array, Array, Array, Array, Array, NDArray[np.bool_]]:
    generator, size = np.random.default_rng(seed), sum(LENGTHS)
    old = np.log(generator.uniform(0.1, 0.9, size))
    logp, engine = old + generator.normal(0, 0.3, size), old + generator.normal(0, 0.3, size)
    return logp, old, engine, generator.normal(size=size), generator.uniform(0.5, 2.0, size), generator.random(size) < 0.8


def compute(
    kind: PolicyLoss, arrays: tuple[NDArray[np.generic], ...], logp: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    now, old, engine, advantage, weight, mask = (torch.from_numpy(a) for a in arrays)
    return policy_loss(kind, now if logp is None else logp, old, engine, advantage, weight, mask, Segments.of(LENGTHS), CLIP)


@pytest.mark.parametrize("kind", POLICY_LOSSES)
@pytest.mark.parametrize("seed", range(5))
def test_against_the_definition(kind: PolicyLoss, seed: int) -> None:
    arrays = inputs(seed)
    mask = arrays[-1]
    for found, expected in zip(compute(kind, arrays), reference(kind, *arrays), strict=True):
        np.testing.assert_allclose(found.numpy()[mask], expected[mask], atol=1e-6)
    assert 0 < reference(kind, *arrays)[1].mean() < 1 or kind == "gspo"


@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_gradient(kind: PolicyLoss) -> None:
    """By autograd's finite differences where the loss is its own antiderivative; the others hold their weight constant."""
    arrays = inputs(0)
    logp = torch.from_numpy(arrays[0]).requires_grad_(True)
    loss, stopped = compute(kind, arrays, logp)
    loss.sum().backward()
    assert logp.grad is not None
    if kind == "ppo_clip":
        assert torch.autograd.gradcheck(lambda x: compute(kind, arrays, x)[0], (logp,))
    else:
        _, old, engine, advantage, weight, mask = (torch.from_numpy(a) for a in arrays)
        log_ratio = logp.detach() - old
        if kind == "dppo":
            log_ratio, weight = logp.detach() - engine, torch.ones_like(old)
        if kind == "gspo":
            segments = Segments.of(LENGTHS)
            log_ratio = segments.spread(segments.mean(log_ratio, mask))
        kept = log_ratio.exp() * (1 - stopped) if kind in ("gspo", "dppo") else log_ratio.exp().clamp(1 - CLIP.low, 1 + CLIP.high)
        torch.testing.assert_close(logp.grad, -weight * advantage * kept)


@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_on_policy_gradient_is_the_score_function(kind: PolicyLoss) -> None:
    old, _, _, advantage, _, mask = (torch.from_numpy(a) for a in inputs(0))
    logp, weight = old.clone().requires_grad_(True), torch.ones_like(old)
    loss, stopped = policy_loss(kind, logp, old, old, advantage, weight, mask, Segments.of(LENGTHS), DEFAULT_CLIPS[kind])
    loss.sum().backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, -advantage)
    assert not stopped.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"), [(1.5, 1.0, True), (1.5, -1.0, False), (0.5, -1.0, True), (0.5, 1.0, False), (1.2, 1.0, False)]
)
def test_a_clip_stops_what_moves_on(ratio: float, advantage: float, clipped: bool) -> None:
    old = torch.tensor([0.4], dtype=torch.float64).log()
    logp = (old + math.log(ratio)).requires_grad_(True)
    one, a = torch.ones(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss, stopped = policy_loss("ppo_clip", logp, old, old, a, one, one.bool(), Segments.of([1]), CLIP)
    loss.sum().backward()
    assert logp.grad is not None
    assert (logp.grad.abs().item() == 0) is clipped
    assert stopped.item() == float(clipped)


def test_dppo_stops_by_probability_and_not_by_ratio() -> None:
    """A rare token may grow tenfold; a frequent one may not move by a quarter."""
    engine = torch.tensor([0.001, 0.5], dtype=torch.float64).log()
    logp = torch.tensor([0.01, 0.8], dtype=torch.float64).log()
    one = torch.ones(2, dtype=torch.float64)
    _, stopped = policy_loss("dppo", logp, logp, engine, one, one, one.bool(), Segments.of([2]), CLIP)
    assert stopped.tolist() == [0.0, 1.0]


def test_the_weight_of_dppo_is_cut() -> None:
    """A token that the learner finds thirty times as probable as the engine counts twenty times."""
    engine = torch.tensor([0.001, 0.001], dtype=torch.float64).log()
    logp = torch.tensor([0.03, 0.019], dtype=torch.float64).log().requires_grad_(True)
    one = torch.ones(2, dtype=torch.float64)
    loss, _ = policy_loss("dppo", logp, logp.detach(), engine, one, one, one.bool(), Segments.of([2]), CLIP)
    loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-20.0, -19.0])


@pytest.mark.parametrize("normalization", ["token", "sequence", "dr"])
def test_normalizations(normalization: str) -> None:
    lengths, losses = [4, 1, 0, 7], [np.full(4, 2.0), np.full(1, -3.0), np.zeros(0), np.full(7, 0.5)]
    scales = response_scales(lengths, normalization, 10)
    found = sum(scale * loss.sum() for scale, loss in zip(scales, losses, strict=True)) / sum(lengths)
    expected = {"token": (8 - 3 + 3.5) / 12, "sequence": (2 - 3 + 0.5) / 3, "dr": (8 - 3 + 3.5) / 30}[normalization]
    assert found == pytest.approx(expected)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"'a2c'.*ppo_clip, gspo, cispo, dppo"):
        compute("a2c", inputs(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'mean'.*token, sequence, dr"):
        response_scales([1], "mean", 1)
