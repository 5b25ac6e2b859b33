"""The proof of an update: what passes and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from hetero_rl.publish import PROOF_GAP_MIN, ProbeProbabilities, proof_failure


def probe(twin: list[float], engine: list[float]) -> ProbeProbabilities:
    return ProbeProbabilities(np.array(twin, np.float32), np.array(engine, np.float32))


OLD = probe([0.5, 0.5, 0.5], [0.501, 0.499, 0.5])


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
    failure = proof_failure(probe([0.5, 0.5], [0.5, bad]), OLD, reference_gap=0.001)
    assert failure is not None
    assert "1 of 2 probe log-probs are not finite" in failure
