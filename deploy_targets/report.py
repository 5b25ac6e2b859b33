"""A report as one self-contained HTML page that works offline, and as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy_targets.gates import Gate, Report, Verdict

if TYPE_CHECKING:
    from rich.console import Console

SENTENCES: Mapping[Verdict, str] = {
    "pass": "What this machine serves is what was trained: every gate is met.",
    "warn": "This machine serves what was trained, but at least one measure is beyond its warning bound.",
    "undecided": "There is too little evidence to tell whether this machine serves what was trained.",
    "fail": "Do not deploy this here: at least one gate is not met.",
}
GATE_TITLES = {
    "gap_mean": "Mean gap / tolerance",
    "nonfinite_share": "Non-finite log-probs",
    "kl_k3": "KL, k3 estimate (nats)",
    "greedy_agreement": "Greedy agreement",
    "accuracy_drop": "Accuracy drop since export",
}
NOTHING = "\N{EN DASH}"
_STYLES: Mapping[Verdict, str] = {"pass": "green", "warn": "yellow", "undecided": "magenta", "fail": "bold red"}
_MARKS: Mapping[Verdict, str] = {"pass": "✓", "warn": "!", "undecided": "?", "fail": "✕"}


def write_html(report: Report, path: Path) -> None:
    """Write `report` as one HTML file. Do not put it into the artifact's folder: `check_artifact` refuses unknown files."""
    path.write_text(render_html(report), "utf-8")


def render_html(report: Report) -> str:
    """The page as text: styles and charts inline, no script, nothing fetched."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("deploy_targets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, title=gate_title)
    return environment.get_template("report.html.jinja").render(
        report=report,
        manifest=report.manifest,
        gap=report.gap.to_json(),
        sentence=SENTENCES[report.verdict],
        marks=_MARKS,
        facts=_facts(report),
        versions=_version_rows(report),
        machines=_machine_rows(report),
        charts=[(Markup(svg), caption) for svg, caption in _charts(report)],
    )


def print_table(report: Report, console: Console) -> None:
    """The gates and the verdict, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    profile = report.manifest.profile
    table = Table(title=escape(f"{profile.name}: {report.manifest.source_model}, weight_version {report.manifest.weight_version}"))
    for column in ("gate", "value", "warn", "fail", "verdict"):
        table.add_column(column, justify="left" if column in ("gate", "verdict") else "right")
    for gate in report.gates:
        verdict = f"[{_STYLES[gate.verdict]}]{gate.verdict}[/]"
        table.add_row(gate_title(gate), number(gate.value), number(gate.warn), number(gate.fail), verdict)
    console.print(table)
    for gate in report.gates:
        if gate.verdict != "pass":
            console.print(f"[{_STYLES[gate.verdict]}]{gate.verdict}[/] {escape(gate.name)}: {escape(gate.detail)}")
    console.print(f"[{_STYLES[report.verdict]}]{report.verdict.upper()}[/] {SENTENCES[report.verdict]}")


def number(value: float | None) -> str:
    """A measured number for people: three significant digits, a dash where nothing was measured."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if np.isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"


def gate_title(gate: Gate) -> str:
    """The gate's name in words."""
    return GATE_TITLES.get(gate.name, gate.name)


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """Headline figures: (label, figure, what it is held against)."""
    gap, task, manifest = report.gap, report.task, report.manifest
    interval = f"95 % interval {number(gap.interval[0])} to {number(gap.interval[1])}" if gap.interval else "no interval"
    at_export = "not measured at export" if manifest.task is None else f"{manifest.task.accuracy:.1%} at export"
    judged = f"{at_export}, {task.num_judged} problems" if task.accuracy is not None else "no reward or no task sample"
    agreement = NOTHING if gap.greedy_agreement is None else f"{gap.greedy_agreement:.1%}"
    return [
        ("Mean gap", number(gap.mean), interval),
        ("Tolerance", number(manifest.tolerance), f"floor {number(manifest.floor)}"),
        ("Greedy agreement", agreement, f"{gap.num_tokens:,} probe tokens"),
        ("Task accuracy", NOTHING if task.accuracy is None else f"{task.accuracy:.1%}", judged),
        ("Generation", number(task.generate_tokens_per_s), "tokens/s, greedy"),
    ]


def _version_rows(report: Report) -> list[tuple[str, str, str]]:
    """(package, version at export, version here), packages of either side."""
    exported, here = report.manifest.package_versions, report.engine_versions
    return [(name, exported.get(name, NOTHING), here.get(name, NOTHING)) for name in sorted(exported.keys() | here.keys())]


def _machine_rows(report: Report) -> list[tuple[str, str, str]]:
    """(property, machine of the export, this machine)."""
    sides = (report.manifest.machine, report.machine)
    rows = [
        ("CPU", *(machine.cpu for machine in sides)),
        ("Cores", *(str(machine.num_cores) for machine in sides)),
        ("Memory", *(f"{machine.memory_gib:g} GiB" for machine in sides)),
        ("GPUs", *(", ".join(machine.gpus) or "none" for machine in sides)),
        ("CPU features", *(", ".join(machine.cpu_features) or NOTHING for machine in sides)),
    ]
    return [(name, exported, here) for name, exported, here in rows]


def _charts(report: Report) -> list[tuple[str, str]]:
    """(SVG, caption) of every chart."""
    from deploy_targets.charts import bar_chart, histogram, line_chart, scatter_chart  # matplotlib takes a second to import

    gap, manifest = report.gap, report.manifest
    bars = {"floor": manifest.floor, "tolerance": manifest.tolerance}
    if manifest.final_gap is not None:
        bars["end of training"] = manifest.final_gap
    if gap.mean is not None:
        bars["this machine"] = gap.mean
    levels = {"tolerance": manifest.tolerance} | ({"mean": gap.mean} if gap.mean is not None else {})
    counts = np.bincount(gap.position) if gap.num_tokens else np.empty(0)
    sums = np.bincount(gap.position, weights=gap.abs_dp) if gap.num_tokens else np.empty(0)
    positions = np.flatnonzero(counts)
    return [
        (
            bar_chart(
                bars,
                title="Floor, tolerance, measured",
                x_label="mean |Δp|",
                intervals={"this machine": gap.interval} if gap.interval else None,
                highlight="this machine",
            ),
            "The floor is what quantization costs the untrained model; the tolerance is what training was held to.",
        ),
        (
            histogram(gap.abs_dp, title="Gap per token", x_label="|p learner - p engine|", y_label="tokens", vertical=levels, log_y=True),
            "Counts on a logarithmic axis: the tail shows single tokens on which the two sides disagree.",
        ),
        (
            scatter_chart(
                np.exp(gap.learner_logps),
                np.exp(gap.engine_logps),
                title="Learner against engine",
                x_label="p learner",
                y_label="p engine",
                diagonal="equal",
            ),
            "One dot per probe token, an even sample where there are many. A right engine scatters tightly around the diagonal.",
        ),
        (
            line_chart(
                {"mean |Δp|": (positions, sums[positions] / counts[positions])},
                title="Gap by position",
                x_label="position in the response (tokens)",
                y_label="mean |Δp|",
                horizontal={"tolerance": manifest.tolerance},
            ),
            "A gap that grows along the response may come from the KV cache; one at the start, from the prompt's prefill.",
        ),
    ]
