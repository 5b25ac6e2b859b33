"""Draws by the inverse of the cumulative distribution: against numpy's search, token by token, and at the ends."""

from __future__ import annotations

import numpy as np
import pytest

from deploy_targets.engines.draws import pick_tokens


@pytest.mark.parametrize("vocab_size", [1, 5, 1024, 1025, 1280, 3000])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_against_a_search_in_the_whole_distribution(vocab_size: int, temperature: float) -> None:
    generator = np.random.default_rng(vocab_size)
    logits = generator.normal(0, 3, (50, vocab_size)).astype(np.float32)
    uniforms = generator.random(50)
    tokens, logps = pick_tokens(logits.copy(), temperature, uniforms)
    probabilities = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float64) / temperature)
    probabilities /= probabilities.sum(1, keepdims=True)
    expected = [int(np.searchsorted(row.cumsum(), u, side="right")) for row, u in zip(probabilities, uniforms, strict=True)]
    assert tokens.tolist() == expected
    np.testing.assert_allclose(logps, np.log(probabilities[np.arange(50), tokens]), atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("num_tokens", [700, 1700])
def test_what_is_drawn_can_be_drawn(uniform: float, num_tokens: int) -> None:
    """Tokens of probability 0 are never drawn, wherever they stand and however the sums are rounded."""
    generator = np.random.default_rng(0)
    logits = np.where(generator.random((200, num_tokens)) < 0.9, -np.inf, generator.normal(0, 5, (200, num_tokens))).astype(np.float32)
    _, logps = pick_tokens(logits, 1.0, np.full(200, uniform))
    assert np.isfinite(logps).all()


def test_frequencies() -> None:
    logits = np.zeros((1, 1600), np.float32)
    logits[0, [3, 300, 1599]] = np.log([500.0, 1000.0, 2000.0])
    probabilities = np.exp(logits[0]) / np.exp(logits[0]).sum()
    tokens, _ = pick_tokens(np.repeat(logits, 20_000, axis=0), 1.0, np.random.default_rng(0).random(20_000))
    found = np.bincount(tokens, minlength=1600) / 20_000
    assert np.abs(found - probabilities).max() < 0.01


def test_greedy_and_rows_that_are_not_finite() -> None:
    logits = np.array([[0.0, 2.0, 1.0], [0.0, np.nan, 1.0]], np.float32)
    for temperature in (0.0, 1.0):
        tokens, logps = pick_tokens(logits.copy(), temperature, np.array([0.5, 0.5]))
        assert ((tokens >= 0) & (tokens < 3)).all()
        assert np.isfinite(logps[0])
        assert np.isnan(logps[1])
    assert pick_tokens(logits[:1].copy(), 0.0, np.zeros(1))[0].tolist() == [1]
