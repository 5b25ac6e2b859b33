"""The multiplier: follows the violation, stays in its bounds, and gives up where it must."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from hetero_rl.algorithm.constraint import DualConfig, DualState, dual_step, infeasible_message

CONFIG = DualConfig(tolerance=0.02, eta=0.1, lambda_max=2.0, lambda_infeasible=0.3, ema=0.0, patience=5)
PID = replace(CONFIG, controller="pid", kp=0.5, kd=1.0)


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


def test_a_least_lambda_stays_inside_the_tolerance_and_yields_to_a_lower_bound() -> None:
    held = replace(CONFIG, lambda_min=0.5)
    assert run(DualState(0.8), [0.01] * 20, held).multiplier == 0.5
    assert run(DualState(0.1), [0.01], held).multiplier == 0.5
    assert run(DualState(0.8), [0.01] * 20, replace(held, controller="pid", kp=0.5)).multiplier == 0.5
    given_up = run(DualState(2.0), [0.05] * 10, held)
    assert given_up.infeasible
    assert given_up.multiplier == 0.3


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


def test_a_gap_that_meets_the_tolerance_now_and_then_is_not_infeasible() -> None:
    assert not run(DualState(2.0), [0.0202, 0.0199] * 40, replace(CONFIG, eta=0.001)).infeasible


def test_near_the_tolerance_lambda_goes_on_rising_until_its_cap() -> None:
    """The floor, and with it the tolerance, is measured to some ten percent: a gap that hovers there is not beyond reach."""
    near = run(DualState(0.0), [0.0216] * 200)
    assert not near.infeasible
    assert near.multiplier == pytest.approx(200 * 0.1 * 0.08)
    assert run(near, [0.0216] * 60).reason == "cap"
    assert run(DualState(0.0), [0.0224] * 60).reason == "rising"


def test_fixed_keeps_lambda_and_still_averages() -> None:
    state = run(DualState(0.3), [0.05] * 50, replace(CONFIG, controller="fixed"))
    assert (state.multiplier, state.gap_ema) == (0.3, pytest.approx(0.05))


def test_nan_gap_changes_nothing() -> None:
    state = DualState(0.3, gap_ema=0.02)
    assert dual_step(state, float("nan"), CONFIG) == state


class TestControllers:
    def test_off_is_zero_and_still_averages(self) -> None:
        state = run(DualState(0.3), [0.05] * 3, replace(CONFIG, controller="off"))
        assert (state.multiplier, state.gap_ema) == (0.0, pytest.approx(0.05))

    def test_fixed(self) -> None:
        assert run(DualState(0.3), [0.5] * 100, replace(CONFIG, controller="fixed")).multiplier == 0.3

    def test_lambda_does_not_depend_on_the_unit_of_the_gap(self) -> None:
        config = replace(PID, patience=1000)
        gaps = np.random.default_rng(0).uniform(0.0, 0.06, 40)
        small = run(DualState(0.3), list(gaps), config)
        large = run(DualState(0.3), list(gaps * 1000), replace(config, tolerance=config.tolerance * 1000))
        assert small.multiplier == pytest.approx(large.multiplier)

    def test_pid_without_p_and_d_is_dual_ascent(self) -> None:
        gaps = list(np.random.default_rng(1).uniform(0.0, 0.2, 200))
        dual, pid = DualState(0.3), DualState(0.3)
        for gap in gaps:
            dual, pid = dual_step(dual, gap, CONFIG), dual_step(pid, gap, replace(CONFIG, controller="pid"))
            assert pid.multiplier == dual.multiplier

    def test_the_gains_of_the_pid_and_its_integral_act_in_it_alone(self) -> None:
        state, gaps = DualState(0.3, integral=1.5), [0.021, 0.03, 0.025]
        assert run(state, gaps, replace(PID, controller="dual")) == run(DualState(0.3), gaps)

    def test_pid_against_numpy(self) -> None:
        """Stooke et al., algorithm 2, on the averaged gap in tolerances, away from every bound."""
        config = replace(PID, ema=0.8, lambda_max=1e9)
        gaps = np.random.default_rng(2).uniform(0.03, 0.06, 30)
        averages = [gaps[0]]
        for gap in gaps[1:]:
            averages.append(0.8 * averages[-1] + 0.2 * gap)
        cost = np.array(averages) / config.tolerance
        rises = np.maximum(np.diff(cost, prepend=cost[0]), 0.0)
        expected = 0.3 + config.eta * np.cumsum(cost - 1) + config.kp * (cost - 1) + config.kd * rises
        state = DualState(0.3)
        for gap, multiplier in zip(gaps, expected, strict=True):
            state = dual_step(state, float(gap), replace(config, patience=1000))
            assert state.multiplier == pytest.approx(multiplier, abs=1e-6)

    def test_a_falling_gap_has_no_derivative_push(self) -> None:
        only_d = replace(CONFIG, controller="pid", eta=0.0, kd=1.0)
        assert run(DualState(0.0), [0.04, 0.01], only_d).multiplier == 0.0
        assert run(DualState(0.0), [0.01, 0.04], only_d).multiplier == pytest.approx(1.5)

    def test_the_integral_does_not_wind_up(self) -> None:
        config = replace(PID, patience=10_000)
        short, long = run(DualState(0.3), [0.5] * 3, config), run(DualState(0.3), [0.5] * 300, config)
        assert long.multiplier == config.lambda_max
        assert long.integral == short.integral == 0.3, "P alone reaches the cap, so the integral is held"
        met = dual_step(long, 0.01, config)
        assert met.multiplier < 0.3, "lambda comes down at once when the constraint is met"

    def test_pid_swings_less_than_dual_ascent(self) -> None:
        """A gap that follows lambda with a lag, the plant on which an integral alone oscillates."""

        def overshoot(config: DualConfig) -> float:
            state, gap, lowest = DualState(0.0), 0.04, 1.0
            for _ in range(200):
                state = dual_step(state, gap, config)
                gap += 0.1 * (0.04 - 0.03 * state.multiplier - gap)
                lowest = min(lowest, gap)
            return config.tolerance - lowest

        calm = replace(CONFIG, lambda_max=100.0, patience=1000)
        assert overshoot(replace(calm, controller="pid", kp=1.0)) < 0.5 * overshoot(calm)


class TestInfeasible:
    RISING = replace(CONFIG, lambda_max=5.0, lambda_infeasible=1.25, eta=0.02, patience=10)

    def test_below_the_cap_where_lambda_rises_in_vain(self) -> None:
        state = run(DualState(0.0), [0.04] * 60, self.RISING)
        assert (state.infeasible, state.reason) == (True, "rising")
        assert state.multiplier == pytest.approx(0.52), "held where it was found: min_rise of the cap, on top of the first step"
        assert run(state, [1.0] * 100, self.RISING).multiplier == state.multiplier

    def test_rising_beyond_the_infeasible_bound_comes_back_to_it(self) -> None:
        state = run(DualState(3.0), [0.04] * 60, self.RISING)
        assert (state.infeasible, state.multiplier) == (True, 1.25)

    def test_a_small_rise_is_not_enough(self) -> None:
        assert not run(DualState(0.0), [0.0201] * 500, self.RISING).infeasible

    def test_a_gap_that_falls_while_lambda_rises_is_not(self) -> None:
        state, gap = DualState(0.0), 1.0
        while gap > 0.03:
            gap *= 0.995
            state = dual_step(state, gap, self.RISING)
            assert not state.infeasible

    def test_lambda_may_still_fall_below_the_bound(self) -> None:
        state = run(DualState(2.0), [0.05] * 10)
        assert run(state, [0.001] * 10).multiplier == 0.0

    def test_the_pid_is_bounded_too(self) -> None:
        state = run(DualState(0.3), [0.5] * 20, PID)
        assert (state.infeasible, state.reason, state.multiplier) == (True, "cap", PID.lambda_infeasible)
        assert run(state, [5.0] * 50, PID).multiplier == PID.lambda_infeasible

    def test_the_integral_comes_down_to_the_bound_with_lambda(self) -> None:
        config = replace(PID, kp=0.1, kd=0.0)
        state = run(DualState(1.9), [0.05] * 20, config)
        assert state.infeasible
        assert dual_step(state, 0.016, config).multiplier == pytest.approx(0.3 - (0.1 + 0.1) * 0.2)

    def test_state_survives_json(self) -> None:
        state = run(DualState(0.3), [0.5] * 20, PID)
        assert DualState(**json.loads(json.dumps(asdict(state)))) == state


class TestRewardWatch:
    CONFIG = replace(CONFIG, reward_window=5, patience=1000)

    def run(self, state: DualState, gaps: list[float], rewards: list[float], config: DualConfig = CONFIG) -> DualState:
        for gap, reward in zip(gaps, rewards, strict=True):
            state = dual_step(state, gap, config, reward)
        return state

    def test_lambda_rising_and_reward_falling_halves_it(self) -> None:
        rewards = [0.9 - 0.05 * i for i in range(6)]
        before = self.run(DualState(0.3), [0.03] * 5, rewards[:5], self.CONFIG)
        after = dual_step(before, 0.03, self.CONFIG, rewards[5])
        assert not before.infeasible
        assert (after.infeasible, after.reason) == (True, "reward")
        assert after.multiplier == pytest.approx((before.multiplier + 0.1 * 0.5) / 2)
        assert self.run(after, [1.0] * 3, [0.9] * 3, self.CONFIG).multiplier == after.multiplier

    def test_it_halves_again_while_the_reward_keeps_falling(self) -> None:
        state = self.run(DualState(0.4), [0.03] * 11, [1.0 - 0.05 * i for i in range(11)], self.CONFIG)
        once = self.run(DualState(0.4), [0.03] * 6, [1.0 - 0.05 * i for i in range(6)], self.CONFIG)
        assert state.multiplier == pytest.approx(once.multiplier / 2)

    @pytest.mark.parametrize(
        ("gap", "rewards"),
        [(0.03, [0.5] * 30), (0.03, [0.5 + 0.01 * i for i in range(30)]), (0.01, [0.9 - 0.03 * i for i in range(30)])],
        ids=["reward flat", "reward rising", "lambda falling"],
    )
    def test_otherwise_not(self, gap: float, rewards: list[float]) -> None:
        assert not self.run(DualState(0.3), [gap] * 30, rewards, self.CONFIG).infeasible

    def test_off_by_default(self) -> None:
        config = replace(self.CONFIG, reward_window=0)
        assert not self.run(DualState(0.3), [0.03] * 12, [0.9 - 0.05 * i for i in range(12)], config).infeasible

    def test_a_step_without_a_reward_is_passed_over(self) -> None:
        rewards = [0.9, 0.85, float("nan"), 0.8, 0.75, 0.7, 0.65]
        state = self.run(DualState(0.3), [0.03] * 7, rewards, self.CONFIG)
        assert (state.infeasible, state.reward_ema) == (True, 0.65)

    def test_a_watch_without_rewards_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="reward_window = 5"):
            dual_step(DualState(0.3), 0.03, self.CONFIG)


class TestMessage:
    def test_nothing_to_say_while_it_stands(self) -> None:
        assert infeasible_message(DualState(0.3, gap_ema=0.02), CONFIG) == ""

    def test_says_what_was_seen_what_was_done_and_what_to_change(self) -> None:
        text = infeasible_message(run(DualState(2.0), [0.05] * 10), CONFIG, floor=0.03)
        for part in (
            "reached its cap",
            "0.0500",
            "tolerance 0.0200",
            "floor 0.0300",
            "below 0.3 ",
            "constraint.tolerance",
        ):
            assert part in text

    def test_a_signal_is_offered_to_those_who_do_not_have_it(self) -> None:
        state = DualState(0.2, gap_ema=0.03, infeasible=True, reason="cap", bound=0.2)
        assert "grey_box" in infeasible_message(state, replace(CONFIG, lambda_infeasible=0.0))
        assert "grey_box" not in infeasible_message(state, replace(CONFIG, lambda_infeasible=1.0))

    def test_reasons_differ(self) -> None:
        state = DualState(0.2, gap_ema=0.03, infeasible=True, bound=0.2)
        texts = {reason: infeasible_message(replace(state, reason=reason), CONFIG) for reason in ("cap", "rising", "reward")}
        assert len(set(texts.values())) == 3
        assert "reward fell" in texts["reward"]
        assert "lambda_max" in texts["reward"]
        assert "kept rising" in texts["rising"]
