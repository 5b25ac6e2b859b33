"""What installed packages add by the entry-point groups `deploy_targets.profiles`, `deploy_targets.engines`, `deploy_targets.quantizers`.

A plug-in that is broken, or that takes a name of another, stops the runs that ask for this name and no others.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from deploy_targets.errors import PlugInError

Kind = Literal["profile", "engine", "quantizer"]


@dataclass(frozen=True, slots=True)
class PlugIn:
    """One entry point: `name` is what a user types, `value` a package (profiles) or `module:Class`."""

    kind: Kind
    name: str
    value: str
    package: str
    """The distribution that registers it, as pip names it."""

    def text(self) -> str:
        """The file `NAME.toml` in the package. Raises `PlugInError`."""
        try:
            return (resources.files(self.value) / f"{self.name}.toml").read_text("utf-8")
        except Exception as error:  # importing the package may raise anything
            raise self._failure(f"{self.name}.toml cannot be read from {self.value!r}", error) from error

    def load(self) -> Any:
        """Import the class. Raises `PlugInError`."""
        try:
            return EntryPoint(self.name, self.value, f"deploy_targets.{self.kind}s").load()
        except Exception as error:  # importing the module may raise anything
            raise self._failure(f"{self.value!r} cannot be imported", error) from error

    def problem(self) -> str | None:
        """Why the class cannot be imported, as far as can be seen without importing its module; packages above it are."""
        module = self.value.partition(":")[0]
        try:
            found = importlib.util.find_spec(module)
        except Exception as error:  # importing the package may raise anything
            return self._failure(f"{module!r} cannot be imported", error).offenders[0]
        return None if found else f"package {self.package!r}: it has no module {module!r}"

    def _failure(self, what: str, error: Exception) -> PlugInError:
        reason = f"package {self.package!r}: {what}: {type(error).__name__}: {error}"
        return PlugInError(self.kind, self.name, reason)


def find_plugins(kind: Kind, shipped: Collection[str]) -> tuple[dict[str, PlugIn], dict[str, str]]:
    """The plug-ins by name, and name -> why it cannot be used: several packages want it, or a package wants one of `shipped`."""
    by_name: dict[str, list[PlugIn]] = defaultdict(list)
    for point in entry_points(group=f"deploy_targets.{kind}s"):
        by_name[point.name].append(PlugIn(kind, point.name, point.value, point.dist.name if point.dist else point.value))
    usable, reasons = {}, {}
    for name, found in sorted(by_name.items()):
        packages = ", ".join(sorted(repr(plugin.package) for plugin in found))
        if name in shipped:
            reasons[name] = f"the name is taken: it is shipped with hetero-rl, and {packages} brings another {kind} of this name"
        elif len(found) > 1:
            reasons[name] = f"the name is taken twice: {packages} each bring a {kind} of this name"
        else:
            usable[name] = found[0]
    return usable, reasons
