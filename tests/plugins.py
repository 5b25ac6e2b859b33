"""Packages that bring targets, laid into a folder as pip would: the modules, and metadata with the entry points."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def lay_out(site: Path, package: str, files: Mapping[str, str], **entry_points: str) -> Path:
    """Install `package` into `site`: `files` are path -> text, `entry_points` group (`profiles`) -> line (`mine = "module"`)."""
    groups = "\n".join(f"[deploy_targets.{group}]\n{line}" for group, line in entry_points.items())
    metadata = {"METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n", "entry_points.txt": groups}
    folder = f"{package.replace('-', '_')}-1.dist-info"
    for name, text in {**files, **{f"{folder}/{name}": text for name, text in metadata.items()}}.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, "utf-8")
    return site


def python_path(*sites: Path) -> str:
    """PYTHONPATH with `sites` before what it holds already."""
    return os.pathsep.join([*map(str, sites), *filter(None, [os.environ.get("PYTHONPATH")])])


def profile(name: str, engine: str = "fake", quantizer: str = "none", process: str = "shared") -> str:
    """A small target profile."""
    return (
        f'name = "{name}"\ndescription = "a plug-in\'s"\n[engine]\nname = "{engine}"\nprocess = "{process}"\n'
        f'[scheme]\nquantizer = "{quantizer}"\n'
    )
