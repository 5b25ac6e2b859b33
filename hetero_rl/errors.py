"""Errors of training, as branches of the tree drawn in `deploy_targets/errors.py`."""

from __future__ import annotations

from deploy_targets.errors import DeployTargetsError, UsageError


class RewardError(DeployTargetsError):
    """A reward function that raised, or gave something that is not one number or None per completion; shows the sample."""


class DivergedError(DeployTargetsError):
    """Loss or gradient was not finite too many times in a row."""


class RunFolderError(UsageError):
    """A run folder that cannot be used: it already holds a run, holds none, or cannot be written."""


class RankError(DeployTargetsError):
    """Another rank of the learner ended, and this one cannot go on by itself."""
