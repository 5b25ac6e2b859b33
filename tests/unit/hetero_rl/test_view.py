"""The live panel and the plain lines, from the rows that a run writes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deploy_targets.profile import load_profile
from hetero_rl.algorithm.constraint import DualState
from hetero_rl.algorithm.tolerance import Floor
from hetero_rl.checkpoint import LoopState
from hetero_rl.config import RunConfig
from hetero_rl.metrics import METRICS, PHASES
from hetero_rl.view import View

SECONDS = {metric: 1.0 + 2.0**-index for index, metric in enumerate(PHASES.values(), start=2)}
ROW = dict.fromkeys(METRICS, 0.5) | SECONDS | {"step": 10.0, "learner/skipped_steps": 0, "perf/step_s": 6.5, "constraint/tolerance": 0.75}

STATE = LoopState(0, 0, DualState(0.0), Floor(0.02, 0.01, 0.03, 4096), 0.75, 0.02, 0.75, (), 0.0)


def shown(*, terminal: bool, **changes: float) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160, no_color=True, legacy_windows=False)
    with View(console) as view:
        view.start(RunConfig(), load_profile("fake"), STATE)
        view.step(ROW | changes)
    return out.getvalue()


def test_phases_are_metrics() -> None:
    assert all(METRICS[metric].unit == "s" and not METRICS[metric].exact for metric in PHASES.values())


def test_panel_shows_every_phase_with_its_seconds() -> None:
    panel = shown(terminal=True)
    for name, metric in PHASES.items():
        assert f"{name} {SECONDS[metric]:.2f}" in panel
    assert "6.50" in panel
    assert "inside the tolerance" in panel


def test_panel_of_a_step_that_a_resume_ended() -> None:
    """Its publish failed, and was made up for by the start."""
    out = io.StringIO()
    with View(Console(file=out, force_terminal=True, width=160, no_color=True, legacy_windows=False)) as view:
        view.start(RunConfig(), load_profile("fake"), STATE)
        view.step({name: value for name, value in ROW.items() if name != PHASES["publish"]})
    assert "learner" in out.getvalue()


@pytest.mark.parametrize("fragment", ["step 10/", "reward 0.500", "gap 0.5000/0.7500", "6.50 s", "deployed accuracy 50.0%, learner 50.0%"])
def test_line_where_there_is_no_terminal(fragment: str) -> None:
    assert fragment in shown(terminal=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_skipped_step_is_said(terminal: bool) -> None:
    said = " ".join(shown(terminal=terminal, **{"step": 7.0, "learner/skipped_steps": 2}).split())
    assert "warning: step 7: 2 optimizer steps were skipped, for want of a finite loss, gradient or engine log-prob" in said
    assert "stops after 5 in a row (learner.max_skipped_in_a_row)" in said
    assert "warning" not in shown(terminal=terminal)
