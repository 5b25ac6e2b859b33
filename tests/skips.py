"""Under `scripts/test.sh` everything is installed, so a test that skips because a part is missing has hidden something: it fails."""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

from deploy_targets.preflight import check_target
from deploy_targets.profile import TargetProfile

REQUIRE_ALL = "HETERO_RL_TESTS_REQUIRE_ALL"
"""Environment variable that `scripts/test.sh` sets to 1."""

LEGITIMATE = re.compile(
    r"Skipped: (needs a GPU|needs a machine without a GPU|has a GPU|compares with Linux's own words|root may write everywhere"
    r"|the fake engine runs no model|[\w-]+ cannot run here: .*(it needs a CUDA GPU|it needs a GPU with|its kernels need a CPU with).*)"
)
"""What no installation can change: the machine, its user, and what a target is by nature. Every other skip is a missing part."""


def skip_unless_it_runs_here(profile: TargetProfile) -> None:
    """Skip the test, with all reasons that `check_target` gives, where this machine cannot run the target."""
    reasons = check_target(profile)
    if reasons:
        pytest.skip(f"{profile.name} cannot run here: {'; '.join(reasons)}")


def _failed_if_a_part_is_missing(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure is reported as a skip too; it has no reason of this kind.
    if os.environ.get(REQUIRE_ALL) != "1" or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not LEGITIMATE.fullmatch(reason):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: {reason}. {REQUIRE_ALL}=1 allows no skip for what an installation could provide"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skips of a test: `pytest.skip`, `skipif`, `importorskip` in its body."""
    report = yield
    _failed_if_a_part_is_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips of a whole file: `importorskip` on top of it."""
    report = yield
    _failed_if_a_part_is_missing(report)
    return report
