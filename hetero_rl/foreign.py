"""What `verify-deploy` is given for an artifact that hetero-rl did not make, and what it opens with it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from deploy_targets.artifact import MANIFEST_FILE, Manifest
from deploy_targets.errors import UsageError
from deploy_targets.foreign import find_artifact, foreign_manifest
from deploy_targets.probes import ProbeSet, read_probes
from deploy_targets.profile import TargetProfile, load_profile
from hetero_rl.delivery import Trust


@dataclass(frozen=True, slots=True)
class Foreign:
    """--probes, --target and --tolerance of `verify-deploy`."""

    probes: Path | None = None
    target: str | None = None
    tolerance: float | None = None

    @property
    def is_given(self) -> bool:
        """Whether any of them is."""
        return self != Foreign()

    def profile(self, artifact: Path, keep: Path | None, trust: Trust, reward: str | None) -> TargetProfile:
        """The target that serves `artifact`, with the tolerance given. Raises `UsageError` for what is missing or not wanted."""
        if (artifact / MANIFEST_FILE).exists():
            raise UsageError(
                f"{artifact} has a manifest, which says its target, probes and tolerance: leave out --probes, --target and --tolerance"
            )
        given = {"--keep": keep, "--public-key": trust.public_key, "--reward": reward}
        unwanted = [name for name, value in given.items() if value is not None]
        if unwanted:
            raise UsageError(
                f"{', '.join(unwanted)}: only for an artifact with a manifest; leave it out, or --probes, --target and --tolerance"
            )
        if self.probes is None or self.target is None:
            raise UsageError(
                f"{artifact} has no manifest: give both --probes FILE, made by `hetero-rl probe MODEL`, and --target NAME, whose engine "
                "serves it"
            )
        profile = load_profile(self.target)
        if self.tolerance is not None:
            profile = profile.model_copy(update={"tolerance": self.tolerance})
        if profile.tolerance is None:
            raise UsageError(
                f"target {profile.name!r} names no tolerance: give --tolerance, the mean abs(p_model - p_artifact) to be allowed, or "
                "`tolerance` in a profile of your own"
            )
        return profile

    def opened(self, artifact: Path, profile: TargetProfile, stack: ExitStack) -> tuple[Path, Manifest, ProbeSet]:
        """The folder that `profile` serves, what stands in for its manifest, and the probes. Raises `ArtifactError` for unfit ones."""
        assert self.probes is not None
        probes = read_probes(self.probes)
        folder = find_artifact(artifact, profile, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        return folder, foreign_manifest(folder, profile, probes), probes
