"""The tree of errors. Whatever a backend raises reaches the user as one of these.

    DeployTargetsError                 exit 1   something failed while it ran
    ├── UsageError (ValueError)        exit 2   the user asked for something that cannot be
    │   ├── UnknownNameError                    a name nobody registered: lists the known, suggests the nearest
    │   ├── MissingPackageError                 a package that is not installed: names the extra
    │   ├── ProfileError                        a profile or config that does not validate: lists every offender
    │   │   └── PlugInError                     an installed plug-in that cannot be used: names the package
    │   └── PreflightError                      model x scheme x engine x hardware do not fit: lists every offender
    ├── ArtifactError                  exit 1   an artifact that is damaged, tampered with or incomplete: names the file
    ├── WeightsError                   exit 1   weights that must not reach an engine (non-finite): names the tensor
    ├── ProofError                     exit 1   an update the engine does not serve as proven by probes
    └── EngineError                    exit 1   the serving runtime failed: carries its last lines

Exit codes of the command line: 0 ok, 1 failed, 2 usage or config, 3 a verification gate not met, 4 a verification left undecided,
130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_UNDECIDED = 4
EXIT_SIGNAL = 128
"""Plus the number of the signal that ended the command, as shells count: 130 is Ctrl-C, 143 is SIGTERM."""
EXIT_INTERRUPTED = 130


class DeployTargetsError(Exception):
    """Base of all errors raised on purpose. The message says what, which, why and how to fix it."""

    exit_code = EXIT_FAILED


class UsageError(DeployTargetsError, ValueError):
    """The request itself is wrong; nothing was started."""

    exit_code = EXIT_USAGE


class UnknownNameError(UsageError):
    """A name that is not registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Build the message from the `kind` of thing, the `name` given and the `known` names."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}")


class MissingPackageError(UsageError):
    """A package that this target needs is not installed."""

    def __init__(self, package: str, needed_for: str, extra: str) -> None:
        """Name the `package`, what it is `needed_for`, and the pip `extra` that brings it."""
        super().__init__(f"{needed_for} needs the package {package!r}. Install it with: pip install 'hetero-rl[{extra}]'")


class ListedError(UsageError):
    """A usage error with several offenders, all of them shown at once."""

    def __init__(self, summary: str, offenders: Sequence[str], hint: str = "") -> None:
        """`summary` is one line, `offenders` one line each, `hint` says how to fix them."""
        self.offenders = tuple(offenders)
        lines = [summary, *(f"  - {offender}" for offender in offenders)]
        super().__init__("\n".join(lines + ([hint] if hint else [])))


class ProfileError(ListedError):
    """A profile or config that does not validate."""


class PlugInError(ProfileError):
    """A name that installed plug-ins contend for, or that stands for something which does not load."""

    def __init__(self, kind: str, name: str, reason: str) -> None:
        """`kind` is profile, engine or quantizer, `name` the one asked for; `reason` names the package."""
        summary = f"the {'target' if kind == 'profile' else kind} {name!r} cannot be used"
        super().__init__(summary, [reason], "Repair, rename or uninstall that package; nothing else is affected")


class PreflightError(ListedError):
    """Model, scheme, engine and hardware do not fit together."""


class ArtifactError(DeployTargetsError):
    """An artifact that is damaged, tampered with or incomplete."""


class WeightsError(DeployTargetsError):
    """Weights that must not reach an engine."""


class ProofError(DeployTargetsError):
    """The engine does not serve the weights that were published."""


class EngineError(DeployTargetsError):
    """The serving runtime failed."""
