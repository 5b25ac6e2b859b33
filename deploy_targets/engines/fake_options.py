"""What the fake engine can be told."""

from __future__ import annotations

from pydantic import Field

from deploy_targets.engines.requests import EngineOptions


class FakeOptions(EngineOptions):
    """The `[engine.options]` of the fake engine: the faults it shows."""

    nan_logps: float = Field(0.0, ge=0, le=1)
    """Share of log-probs returned as NaN."""
    stale: bool = False
    """Report the new weight_version but keep the old weights."""
    fail_updates: int = Field(0, ge=0)
    """How many updates fail before one succeeds."""
