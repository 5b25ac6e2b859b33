"""Every weight against a loop over the definition in float64, score centering against exact expectations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hetero_rl.algorithm.corrections import (
    CENTERED,
    CORRECTIONS,
    DEFAULT_BOUNDS,
    Bounds,
    Centered,
    Correction,
    correction_weights,
    effective_share,
    mean_score,
)
from hetero_rl.algorithm.segments import Segments

Array = NDArray[np.floating[Any]]
NAN, INF = float("nan"), float("inf")
LENGTHS = [6, 1, 9, 4]
BOUNDS = Bounds(0.7, 1.4)


def reference(kind: Correction, old: Array, engine: Array, mask: NDArray[np.bool_], low: float, high: float) -> Array:
    """The table of corrections.py, one token after the other, from probabilities."""
    weights, start = np.zeros(len(old)), 0
    for length in LENGTHS:
        tokens = [t for t in range(start, start + length) if mask[t]]
        ratios = [math.exp(old[t]) / math.exp(engine[t]) for t in tokens]
        product = math.prod(ratios)
        for t, ratio in zip(tokens, ratios, strict=True):
            looked_at = {"mis_geometric": product ** (1 / len(tokens)), "tis_sequence": product, "mis_sequence": product}.get(kind, ratio)
            if kind == "none":
                weights[t] = 1.0
            elif kind.startswith("tis"):
                weights[t] = high if looked_at > high else looked_at
            else:
                weights[t] = looked_at if low <= looked_at <= high else 0.0
        start += length
    return weights


def batch(seed: int) -> tuple[Array, Array, NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    old = np.log(generator.uniform(0.05, 0.95, sum(LENGTHS)))
    return old, old + generator.normal(0, 0.3, sum(LENGTHS)), generator.random(sum(LENGTHS)) < 0.8


def weigh(kind: Correction, old: Array, engine: Array, mask: NDArray[np.bool_], bounds: Bounds | None = BOUNDS) -> Array:
    tensors = torch.from_numpy(old), torch.from_numpy(engine), torch.from_numpy(mask)
    weights: Array = correction_weights(kind, *tensors, Segments.of(LENGTHS), bounds).numpy()
    return weights


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_weights_against_the_definition(kind: Correction) -> None:
    dropped = cut = 0
    for seed in range(20):
        old, engine, mask = batch(seed)
        expected = reference(kind, old, engine, mask, *BOUNDS)
        np.testing.assert_allclose(weigh(kind, old, engine, mask), expected, atol=1e-6)
        dropped += int((expected[mask] == 0).sum())
        cut += int((expected[mask] == BOUNDS.high).sum())
    assert (dropped > 0) is (kind.startswith("mis") or kind == "icepop"), "the inputs reach both sides of the bounds"
    assert (cut > 0) is kind.startswith("tis")


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_float32_weights_are_those_of_float64(kind: Correction) -> None:
    """What a run computes in, against the definition of the very numbers that it is given."""
    for seed in range(20):
        old, engine, mask = batch(seed)
        old, engine = (np.asarray(values, np.float32) for values in (old, engine))
        expected = reference(kind, np.asarray(old, np.float64), np.asarray(engine, np.float64), mask, *BOUNDS)
        np.testing.assert_allclose(weigh(kind, old, engine, mask), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_default_bounds_are_used(kind: Correction) -> None:
    old, engine, mask = batch(0)
    np.testing.assert_allclose(weigh(kind, old, engine, mask, None), reference(kind, old, engine, mask, *DEFAULT_BOUNDS[kind]), atol=1e-6)


@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nonfinite_log_probs_outside_the_mask_poison_nothing(kind: Correction, bad: float) -> None:
    old, engine, mask = batch(1)
    dirty = np.where(mask, engine, bad)
    np.testing.assert_array_equal(weigh(kind, old, dirty, mask), weigh(kind, old, engine, mask))
    assert not weigh(kind, old, dirty, mask)[~mask].any()


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_weights_have_no_gradient(kind: Correction) -> None:
    old, engine, mask = batch(2)
    learner = torch.from_numpy(old).requires_grad_(True)
    weights = correction_weights(kind, learner, torch.from_numpy(engine).requires_grad_(True), torch.from_numpy(mask), Segments.of(LENGTHS))
    assert not weights.requires_grad


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_equal_policies_weigh_one(kind: Correction) -> None:
    old, _, mask = batch(3)
    np.testing.assert_array_equal(weigh(kind, old, old, mask, None), mask.astype(float))


@pytest.mark.parametrize(("kind", "expected"), [("tis_sequence", 1.4), ("mis_sequence", 0.0), ("mis_geometric", 0.0)])
def test_ratios_beyond_float32_are_cut_or_dropped(kind: Correction, expected: float) -> None:
    old, engine = torch.full((200,), -0.1), torch.full((200,), -3.0)
    mask = torch.ones(200, dtype=torch.bool)
    weights = correction_weights(kind, old, engine, mask, Segments.of([200]), BOUNDS)
    assert weights.tolist() == pytest.approx([expected] * 200)


def test_the_geometric_mean_does_not_depend_on_the_length() -> None:
    for length in (1, 50):
        old, mask = torch.full((length,), -1.0), torch.ones(length, dtype=torch.bool)
        weights = correction_weights("mis_geometric", old, old - 0.05, mask, Segments.of([length]), BOUNDS)
        assert weights.tolist() == pytest.approx([math.exp(0.05)] * length, rel=1e-5)


def three_tokens(learner_logp: Array, engine_logp: Array, bounds: Bounds) -> Array:
    """Token-level TIS of one response of three."""
    tensors = torch.from_numpy(learner_logp).requires_grad_(True), torch.from_numpy(engine_logp), torch.ones(3, dtype=torch.bool)
    weights = correction_weights("tis", *tensors, Segments.of([3]), bounds)
    assert not weights.requires_grad
    return np.asarray(weights.numpy())


def test_token_tis_corrects_the_expectation_exactly_below_its_cap() -> None:
    learner, engine, reward = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1]), np.array([1.0, -2.0, 4.0])
    weights = three_tokens(np.log(learner), np.log(engine), Bounds(0.0, 2.5))
    assert (engine * weights * reward).sum() == pytest.approx((learner * reward).sum())


def test_unknown_kinds_list_the_known() -> None:
    old, engine, mask = batch(0)
    with pytest.raises(ValueError, match=r"'mix'.*none, tis, tis_sequence, mis, mis_sequence, mis_geometric, icepop"):
        weigh("mix", old, engine, mask)  # type: ignore[arg-type]


class TestEffectiveShare:
    def test_against_numpy(self) -> None:
        weights = np.random.default_rng(0).exponential(size=50)
        share = effective_share(weights.sum(), (weights**2).sum(), 50)
        assert share == pytest.approx(weights.mean() ** 2 / (weights**2).mean(), abs=1e-6)

    def test_ends(self) -> None:
        assert effective_share(3 * 0.3, 3 * 0.09, 3) == pytest.approx(1.0)
        assert effective_share(5.0, 25.0, 3) == pytest.approx(1 / 3)
        assert effective_share(0.0, 0.0, 3) == 0.0
        assert math.isnan(effective_share(0.0, 0.0, 0))


class TestScoreCentering:
    """Three prefixes with a vocabulary of five: small enough for every expectation to be a sum."""

    VOCAB = 5

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(3, self.VOCAB, dtype=torch.float64, generator=generator)
        return logits, torch.log_softmax(logits + 0.4 * torch.randn(3, self.VOCAB, dtype=torch.float64, generator=generator), dim=-1)

    def token_weights(self, kind: Centered, learner: Array, engine: Array) -> Array:
        """f(p / q) over the vocabulary, by the table."""
        ratio, (low, high) = learner / engine, BOUNDS
        if kind == "none":
            return np.ones_like(ratio)
        return np.minimum(ratio, high) if kind == "tis" else np.where((ratio >= low) & (ratio <= high), ratio, 0.0)

    @pytest.mark.parametrize("kind", CENTERED)
    def test_value(self, kind: Centered) -> None:
        logits, engine_logp = self.inputs()
        learner, engine = logits.softmax(-1).numpy(), engine_logp.exp().numpy()
        advantage = np.array([1.5, -0.5, 2.0])
        term = torch.from_numpy(advantage) * mean_score(logits.log_softmax(-1), engine_logp, kind, BOUNDS)
        expected = advantage * (engine * self.token_weights(kind, learner, engine) * np.log(learner)).sum(-1)
        np.testing.assert_allclose(term.numpy(), expected, atol=1e-6)

    @pytest.mark.parametrize("kind", CENTERED)
    def test_drift_is_cancelled_and_the_covariance_is_left(self, kind: Centered) -> None:
        """The engine draws each token; the mean gradient on the logits must be -Cov_q(A, f grad log p), with no E_q[A] part."""
        logits, engine_logp = self.inputs()
        learner, engine = logits.softmax(-1).numpy(), engine_logp.exp().numpy()
        weights = self.token_weights(kind, learner, engine)
        advantages = np.random.default_rng(1).normal(2.0, 1.0, (3, self.VOCAB))  # A mean of 2: drift dominates without the term.
        logits.requires_grad_(True)
        loss = torch.zeros((), dtype=torch.float64)
        for token in range(self.VOCAB):
            logp = torch.log_softmax(logits, dim=-1)[:, token]
            advantage = torch.from_numpy(advantages[:, token])
            term = advantage * mean_score(logits.log_softmax(-1), engine_logp, kind, BOUNDS)
            loss = loss + (torch.from_numpy(engine[:, token]) * (-advantage * torch.from_numpy(weights[:, token]) * logp + term)).sum()
        loss.backward()
        scores = np.eye(self.VOCAB)[None] - learner[:, None, :]  # [prefix, token drawn, logit]: grad log p on the logits.
        weighted = weights[:, :, None] * scores
        mean_advantage, drift = (engine * advantages).sum(-1), (engine[:, :, None] * weighted).sum(1)
        covariance = (engine[:, :, None] * advantages[:, :, None] * weighted).sum(1) - mean_advantage[:, None] * drift
        assert logits.grad is not None
        np.testing.assert_allclose(logits.grad.numpy(), -covariance, atol=1e-6)
        assert np.abs(mean_advantage[:, None] * drift).max() > 0.01, "there was a drift to cancel"

    def test_no_gradient_where_engine_and_learner_agree(self) -> None:
        logits, _ = self.inputs()
        engine_logp = torch.log_softmax(logits, dim=-1)
        logits.requires_grad_(True)
        mean_score(logits.log_softmax(-1), engine_logp).sum().backward()
        assert logits.grad is not None
        assert logits.grad.abs().max() < 1e-12

    def test_gradient_is_the_learners_alone(self) -> None:
        logits, engine_logp = self.inputs()
        engine_logp.requires_grad_(True)
        assert torch.autograd.gradcheck(lambda x: mean_score(x.log_softmax(-1), engine_logp), (logits.requires_grad_(True),))
        mean_score(logits.log_softmax(-1), engine_logp).sum().backward()
        assert engine_logp.grad is None

    @pytest.mark.parametrize("kind", CENTERED)
    def test_impossible_tokens(self, kind: Centered) -> None:
        logits, engine_logp = self.inputs()
        engine_logp[2, 0] = -INF
        logits[2, 0] = -INF
        logits.requires_grad_(True)
        term = mean_score(logits.log_softmax(-1), engine_logp, kind, BOUNDS)
        term.sum().backward()
        assert torch.isfinite(term).all()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        assert logits.grad.abs().max() > 0

    def test_sequence_weights_are_refused(self) -> None:
        logits, engine_logp = self.inputs()
        with pytest.raises(ValueError, match="'tis_sequence'"):
            mean_score(logits.log_softmax(-1), engine_logp, "tis_sequence")  # type: ignore[arg-type]
