"""The multiplier: follows the violation, stays in its bounds, and gives up where it must."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetero_rl.algorithm.constraint import DualConfig, DualState, dual_step

CONFIG = DualConfig(tolerance=0.02, eta=0.1, lambda_max=2.0, lambda_infeasible=0.3, ema=0.0, patience=5)


def run(state: DualState, gaps: list[float], config: DualConfig = CONFIG) -> DualState:
    for gap in gaps:
        state = dual_step(state, gap, config)
    return state


def test_one_step_closed_form() -> None:
    assert dual_step(DualState(0.3), 0.03, CONFIG).multiplier == pytest.approx(0.3 + 0.1 * (0.03 / 0.02 - 1))


def test_ema() -> None:
    state = run(DualState(0.0), [0.04, 0.02], replace(CONFIG, ema=0.9))
    assert state.gap_ema == pytest.approx(0.9 * 0.04 + 0.1 * 0.02)


def test_free_inside_the_tolerance() -> None:
    assert run(DualState(0.3), [0.01] * 20).multiplier == 0.0


def test_never_beyond_the_cap() -> None:
    assert run(DualState(0.0), [1.0] * 4).multiplier == 2.0


def test_infeasible_is_detected_and_bounded() -> None:
    state = run(DualState(2.0), [0.05] * 10)
    assert state.infeasible
    assert state.multiplier == 0.3
    assert run(state, [1.0] * 100).multiplier == 0.3


def test_a_gap_that_falls_is_not_infeasible() -> None:
    gap, state = 0.2, DualState(2.0)
    for _ in range(60):
        gap *= 0.97
        state = dual_step(state, gap, CONFIG)
    assert not state.infeasible


def test_met_constraint_resets_the_watch() -> None:
    config = replace(CONFIG, eta=0.001)
    state = run(DualState(2.0), [0.05] * 4 + [0.01] + [0.05] * 4, config)
    assert not state.infeasible


def test_fixed_keeps_lambda_and_still_averages() -> None:
    state = run(DualState(0.3), [0.05] * 50, replace(CONFIG, ascent=False))
    assert (state.multiplier, state.gap_ema) == (0.3, pytest.approx(0.05))


def test_nan_gap_changes_nothing() -> None:
    state = DualState(0.3, gap_ema=0.02)
    assert dual_step(state, float("nan"), CONFIG) == state
