"""The proof of an update: what passes and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from hetero_rl.publish import PROOF_GAP_MIN, ProbeProbabilities, proof_failure, unrounded_failure


def probe(twin: list[float], engine: list[float]) -> ProbeProbabilities:
    return ProbeProbabilities(np.array(twin, np.float32), np.array(engine, np.float32))


OLD = np.array([0.5, 0.5, 0.5], np.float32)
"""What the twin answered before."""


def test_an_engine_that_follows_is_proven() -> None:
    assert proof_failure(probe([0.6, 0.4, 0.55], [0.601, 0.399, 0.551]), OLD, reference_gap=0.001) is None


def test_kernels_may_differ_a_little_but_not_a_lot() -> None:
    assert proof_failure(probe([0.6], [0.6 * (1 + 0.9 * PROOF_GAP_MIN)]), None, reference_gap=0.0) is None
    failure = proof_failure(probe([0.6], [0.6 * (1 + 1.1 * PROOF_GAP_MIN)]), None, reference_gap=0.0)
    assert failure is not None
    assert "more than 0.0120" in failure


def test_a_stale_engine_is_caught_though_it_is_within_the_bound() -> None:
    failure = proof_failure(probe([0.51, 0.49, 0.51], [0.501, 0.499, 0.5]), OLD, reference_gap=0.001)
    assert failure is not None
    assert "as before the update" in failure


def test_a_step_too_small_to_tell_is_not_called_stale() -> None:
    assert proof_failure(probe([0.5005, 0.4995, 0.5], [0.501, 0.499, 0.5]), OLD, reference_gap=0.001) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_probes_fail(bad: float) -> None:
    """On either side: a comparison with NaN is false, and would pass for agreement."""
    for measured, whose in ((probe([0.5, 0.5], [0.5, bad]), "the engine's"), (probe([bad, 0.5], [0.5, 0.5]), "the learner's")):
        failure = proof_failure(measured, OLD, reference_gap=0.001)
        assert failure is not None
        assert f"1 of {whose} 2 probe log-probs are not finite" in failure


@pytest.mark.parametrize("reference_gap", [0.0, 0.01, 1.0])
def test_another_model_fails_however_small_its_probabilities(reference_gap: float) -> None:
    """Where all tokens are unlikely, the gap between any two models is small; and no reference makes up for it."""
    generator = np.random.default_rng(0)
    twin, engine = (generator.dirichlet(np.ones(40)).astype(np.float32) for _ in range(2))
    assert np.abs(twin - engine).mean() < 0.03
    assert proof_failure(ProbeProbabilities(twin, engine), None, reference_gap) is not None
    assert proof_failure(ProbeProbabilities(twin, twin * np.float32(1.01)), None, reference_gap) is None


def test_an_engine_that_serves_the_weights_unrounded() -> None:
    twin, plain = probe([0.6, 0.3], [0.5, 0.4]), np.array([0.501, 0.399], np.float32)
    failure = unrounded_failure(twin, plain)
    assert failure is not None
    assert "as if nothing were quantized" in failure
    assert unrounded_failure(probe([0.6, 0.3], [0.59, 0.31]), plain) is None
    assert unrounded_failure(probe([0.502, 0.398], [0.501, 0.399]), plain) is None, "the rounding does not show"
