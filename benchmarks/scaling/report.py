"""The tables of docs/scaling.md and its charts, from a record alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.report import standalone
from benchmarks.scaling import overlap
from deploy_targets.charts import line_chart

Entry = Mapping[str, Any]
PLAN_FILE = "scaling_plan.jsonl"
NOT_CHECKED = "There is no record of this check yet: `python -m benchmarks.scaling` makes it."
WORTH_IT = 0.05
"""Least share of the step that doubling something saves where it is named."""


def row(cells: Sequence[str]) -> str:
    """Of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table(plan: Sequence[Entry], engines: Mapping[str, Mapping[str, Any]]) -> str:
    """What to buy next, one table for each kind of engine; seconds."""
    head = ["model", "engines", "step", "`one_step_off`", "decode", "stragglers", "learner", "publish"]
    head += ["first bottleneck", "what saves most"]
    lines: list[str] = []
    for engine, spec in engines.items():
        lines += ["", f"{spec['what']}:", "", row(head), row(["---"] * len(head))]
        for entry in (entry for entry in plan if entry["engine"] == engine):
            spent = entry["spent_s"]
            publish = sum(seconds for name, seconds in spent.items() if name not in ("decode", "stragglers", "learner", "reward"))
            seconds = (entry["step_s"], entry["one_step_off_s"], spent["decode"], spent["stragglers"], spent["learner"], publish)
            bottleneck = f"{entry['bottleneck']}, {100 * spent[entry['bottleneck']] / entry['step_s']:.0f} %"
            counts = [entry["model"], f"{entry['num_engines']:,}", *(f"{value:.0f}" for value in seconds)]
            lines.append(row([*counts, bottleneck, advice(entry)]))
    return "\n".join(lines[1:])


def advice(entry: Entry) -> str:
    """The two things that save most, with the share of the step."""
    best = sorted(entry["saved"].items(), key=lambda item: -item[1])[:2]
    named = [f"{_named(what)} -{100 * share:.0f} %" for what, share in best if share >= WORTH_IT]
    return "; ".join(named) or "nothing by itself"


def _named(what: str) -> str:
    return "`one_step_off`" if "schedule" in what else f"2x {what}"


def check_table(record: Mapping[str, Any]) -> str:
    """The simulation against what was measured here."""
    head = ["run on this machine", "measured, s per step", "simulated / measured", "rollout", "learner", "publish"]
    lines = [row(head), row(["---"] * len(head))]
    for name, case in record["cases"].items():
        ratio = f"{case['ratio_median']:.2f} ({case['ratio_low']:.2f} to {case['ratio_high']:.2f})"
        phases = [f"{case['phases_s'][phase]['ratio']:.2f}" for phase in ("rollout", "learn", "publish")]
        lines.append(row([name, f"{case['median']:.2f} ({case['low']:.2f} to {case['high']:.2f})", ratio, *phases]))
    return "\n".join(lines)


def charts(plan: Sequence[Entry], engines: Mapping[str, Mapping[str, Any]], images: Path) -> list[str]:
    """Step time by engines, a chart for each kind; returns the lines that show them."""
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for engine, spec in engines.items():
        series: dict[str, tuple[list[float], list[float]]] = {}
        for entry in (entry for entry in plan if entry["engine"] == engine):
            for name, key in ((entry["model"], "step_s"), (f"{entry['model']}, one_step_off", "one_step_off_s")):
                xs, ys = series.setdefault(name, ([], []))
                xs.append(math.log2(entry["num_engines"]))
                ys.append(entry[key])
        chart = line_chart(
            series, title=f"A step by engines: {spec['what']}", x_label="log2 of engines (3: 8, 5: 32, 7: 128, 10: 1,024)",
            y_label="seconds, predicted", log_y=True, markers=True,
        )  # fmt: skip
        (images / f"{engine}.svg").write_text(standalone(chart), "utf-8")
        lines.append(f"![Predicted seconds of a step by the number of engines, {spec['what']}](images/{images.name}/{engine}.svg)")
    return lines


def fill(page: str, marker: str, text: str) -> str:
    """Put `text` between the markers of `page`. Raises `SystemExit` where it has lost them."""
    begin, end = f"<!-- {marker}: made by python -m benchmarks.scaling plan -->\n", f"<!-- end of {marker} -->\n"
    before, found, rest = page.partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise SystemExit(f"the page has lost the markers of {marker!r}; put them back")
    return f"{before}{begin}\n{text}\n\n{end}{after}"


def read_plan(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """What the plan was made from, and its lines."""
    about, *lines = map(json.loads, path.read_text("utf-8").splitlines())
    return about, lines


def page_of(results: Path, page: str, images: Path) -> str:
    """The page with what the records say; writes the charts."""
    about, lines = read_plan(results / PLAN_FILE)
    engines, record = about["hardware"]["engines"], results / "scaling.json"
    checked = check_table(json.loads(record.read_text("utf-8"))) if record.is_file() else NOT_CHECKED
    page = fill(page, "check", checked)
    return fill(page, "plan", "\n\n".join([table(lines, engines), *charts(lines, engines, images)]))


def write_report(results: Path, docs: Path) -> None:
    """Make the generated parts of docs/scaling.md and docs/scale.md anew."""
    plan, scale = docs / "scaling.md", docs / "scale.md"
    plan.write_text(page_of(results, plan.read_text("utf-8"), docs / "images" / "scaling"), "utf-8")
    scale.write_text(fill(scale.read_text("utf-8"), "overlap", overlap.text(results)), "utf-8")
