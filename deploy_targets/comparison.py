"""Two reports side by side: what one machine, engine or artifact does against another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_targets.errors import UsageError
from deploy_targets.gates import FORMAT, VERDICTS
from deploy_targets.report import GATE_TITLES, MEASURE_TITLES, NOTHING, number

if TYPE_CHECKING:
    from rich.console import Console

Json = Mapping[str, Any]
COSTS = {
    "generate_tokens_per_s": ("Generation (tokens/s)", 1.0),
    "first_token_s": ("First token (ms)", 1000.0),
    "peak_memory_bytes": ("Peak memory (MiB)", 2.0**-20),
    "weights_bytes": ("Weights (MiB)", 2.0**-20),
}
"""Key of the report -> title, and what to multiply by."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of both reports. `apart`: their 95 % intervals do not overlap; None where one of them has no interval."""

    title: str
    a: str
    b: str
    difference: float | None = None
    apart: bool | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """Rows under one heading."""

    title: str
    rows: tuple[Row, ...]


def read_report(path: Path) -> Json:
    """A report that `verify-deploy --json` wrote. Raises `UsageError` for anything else."""
    try:
        report = json.loads(path.read_text("utf-8"))
        found = report.get("format") if isinstance(report, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as a report: {error}. Give files that verify-deploy --json wrote") from None
    if found != FORMAT:
        raise UsageError(f"{path} is no report of the format {FORMAT!r} (its format is {found!r}). Write it anew by verify-deploy --json")
    return dict(report)


def compare(a: Json, b: Json) -> tuple[Section, ...]:
    """What both were measured on, their gates, measures and costs; a difference is that of `b` to `a`.

    Raises `UsageError` where a report lacks a figure that its format has.
    """
    try:
        return (
            Section("Measured", (*(Row(what, _words(a, what), _words(b, what)) for what in _WORDS), *_version_rows(a, b))),
            Section("Gates", tuple(_gate_rows(a, b))),
            Section("Measures", tuple(_row(title, a["measures"][name], b["measures"][name]) for name, title in MEASURE_TITLES.items())),
            Section(
                "Costs",
                tuple(
                    _row(title, *({"value": _times(side["cost"][key], scale)} for side in (a, b))) for key, (title, scale) in COSTS.items()
                ),
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"a report lacks {error}: it was changed by hand. Write it anew by verify-deploy --json") from None


def print_comparison(sections: tuple[Section, ...], console: Console) -> None:
    """The sections as tables for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    for section in sections:
        table = Table(title=section.title, title_justify="left")
        for column in ("", "A", "B", "B - A", ""):
            table.add_column(column, overflow="fold")
        for row in section.rows:
            table.add_row(escape(row.title), escape(row.a), escape(row.b), signed(row.difference), remark(row))
        console.print(table)


def write_comparison(a: Json, b: Json, path: Path) -> None:
    """Both reports as one self-contained HTML page. Raises as `compare`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("deploy_targets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("comparison.html.jinja")
    page = template.render(a=a, b=b, sections=compare(a, b), verdicts=VERDICTS, remark=remark, signed=signed)
    path.write_text(page, "utf-8")


def signed(difference: float | None) -> str:
    """A difference for people, empty where there is none."""
    return "" if difference is None else f"{difference:+,.0f}" if abs(difference) >= 1000 else f"{difference:+.3g}"


def remark(row: Row) -> str:
    """What can be said of the difference."""
    if row.apart is None:
        return "differs" if row.difference is None and row.a != row.b else ""
    return "intervals apart" if row.apart else "intervals overlap"


_WORDS = ("verdict", "most likely cause", "target", "model", "weight version", "artifact sha256", "engine", "hardware", "created")


def _words(report: Json, what: str) -> str:
    engine, hardware = report["engine"], report["hardware"]
    if what == "engine":
        return str(engine["name"] if engine["server"] is None else f"{engine['name']} at {engine['server']['url']}")
    if what == "most likely cause":
        return NOTHING if report["blame"] is None else str(report["blame"]["sentence"])
    if what == "hardware":
        gpus = ", ".join(hardware["gpus"]) or "no GPU"
        return f"{hardware['cpu']}, {hardware['num_cores']} cores, {hardware['memory_gib']:g} GiB, {gpus}"
    return str(engine["weight_version"] if what == "weight version" else report[what.replace(" ", "_")])


def _version_rows(a: Json, b: Json) -> list[Row]:
    """Packages whose versions differ."""
    sides = [report["engine"]["versions"] for report in (a, b)]
    names = sorted(sides[0].keys() | sides[1].keys())
    return [Row(name, *found) for name in names if len(set(found := [side.get(name, NOTHING) for side in sides])) > 1]


def _times(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _gate_rows(a: Json, b: Json) -> list[Row]:
    gates = [{gate["name"]: gate for gate in report["gates"]} for report in (a, b)]
    names = list(dict.fromkeys([*gates[0], *gates[1]]))
    return [_row(GATE_TITLES.get(name, name), *(side.get(name, {"value": None}) for side in gates)) for name in names]


def _row(title: str, a: Json, b: Json) -> Row:
    if a["value"] is None or b["value"] is None:
        return Row(title, _shown(a), _shown(b))
    apart = None
    if all(side.get(end) is not None for side in (a, b) for end in ("low", "high")):
        apart = a["high"] < b["low"] or b["high"] < a["low"]
    return Row(title, _shown(a), _shown(b), b["value"] - a["value"], apart)


def _shown(side: Json) -> str:
    between = "" if side.get("low") is None or side.get("high") is None else f" [{number(side['low'])}, {number(side['high'])}]"
    return f"{number(side['value'])}{between} {side.get('verdict', '')}".rstrip()
