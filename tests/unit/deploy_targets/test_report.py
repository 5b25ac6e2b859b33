"""The page is self-contained, escapes what it shows, and its charts carry the page's colours."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from deploy_targets.artifact import PROBES_FILE, check_artifact
from deploy_targets.charts import bar_chart, histogram, line_chart, scatter_chart
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.gap import MEASURES
from deploy_targets.gates import Coverage, Report
from deploy_targets.probes import read_probes
from deploy_targets.report import MEASURE_TITLES, SENTENCES, SLICE_TITLES, measured_sentence, number, print_table, render_html, write_html
from deploy_targets.verify import verify
from tests.artifacts import VERSION, make_artifact
from tests.conftest import TinyModels
from tests.gaps import empty_gap


@pytest.fixture(scope="module")
def report(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("report") / "artifact"
    make_artifact(tiny_models("qwen2"), folder, shift=lambda logps: logps * np.float32(1.02))
    return verify(folder, FakeEngine(folder, {}, VERSION), check_artifact(folder), read_probes(folder / PROBES_FILE))


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.links.append(value or "")


def test_the_page_fetches_nothing_and_runs_nothing(report: Report) -> None:
    page = Collector()
    text = render_html(report)
    page.feed(text)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_every_reference_has_its_target(report: Report) -> None:
    text = render_html(report)
    page = Collector()
    page.feed(text)
    assert page.tags.count("svg") == 4
    assert len(page.ids) == len(set(page.ids))
    references = {link.removeprefix("#") for link in page.links} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert references <= set(page.ids)


def test_the_page_says_what_was_measured(report: Report) -> None:
    text = render_html(report)
    mean = number(report.gap.measures["abs_dp_mean"].value)
    for fragment in (SENTENCES[report.verdict], report.artifact_sha256, mean, report.machine.cpu, report.created,
                     *report.manifest.files, *(gate.detail for gate in report.gates if "'" not in gate.detail)):  # fmt: skip
        assert fragment in text


def test_hostile_names_are_escaped(report: Report) -> None:
    nasty = "<script>alert('x')</script>"
    hostile = replace(report, manifest=report.manifest.model_copy(update={"source_model": nasty}), engine_versions={nasty: nasty})
    text = render_html(hostile)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_report_without_one_finite_token_still_renders(report: Report, tmp_path: Path) -> None:
    write_html(replace(report, gap=empty_gap(500)), tmp_path / "r.html")
    assert "no data" in (tmp_path / "r.html").read_text("utf-8")


def test_the_terminal_table_names_every_gate_and_the_verdict(report: Report) -> None:
    buffer = io.StringIO()
    odd = replace(report, manifest=report.manifest.model_copy(update={"source_model": "[bold]x[/bold]"}))
    print_table(odd, Console(file=buffer, width=120))
    text = buffer.getvalue()
    assert "[bold]x[/bold]" in text
    assert report.verdict.upper() in text
    assert text.count("pass") + text.count("warn") + text.count("fail") >= len(report.gates)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "\N{EN DASH}"), (0.0123456, "0.0123"), (12345.6, "12,346"), (0.0, "0"), (float("inf"), "inf")]
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


XS = [0.0, 1.0, 2.0]
CHARTS = {
    "line": lambda label: line_chart(
        {label: (XS, [1.0, float("nan"), 3.0])}, title=label, x_label=label, y_label=label, horizontal={label: 2.0}
    ),
    "log": lambda label: line_chart({label: (XS, [0.1, 1.0, 10.0])}, title=label, x_label=label, y_label=label, log_y=True),
    "histogram": lambda label: histogram(XS, title=label, x_label=label, y_label=label, vertical={label: 1.0}, log_y=True),
    "bars": lambda label: bar_chart({label: 1.0, "b": 2.0}, title=label, x_label=label, intervals={label: (0.5, 1.5)}, highlight=label),
    "scatter": lambda label: scatter_chart(XS, XS, title=label, x_label=label, y_label=label, diagonal=label),
}


@pytest.mark.parametrize("kind", CHARTS)
def test_charts_are_wellformed_repeatable_and_take_any_label(kind: str) -> None:
    label = 'a $x_1$ <b> & "c" $'
    svg = CHARTS[kind](label)
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == label
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    assert label in {"".join(text.itertext()).strip() for text in texts}
    assert all("fill: currentColor" in text.get("style", "") for text in texts), "matplotlib leaves out black, the default of SVG"
    assert svg == CHARTS[kind](label)
    assert "currentColor" in svg
    assert "var(--chart-1" in svg
    assert "<style" not in svg
    drawn = {value for element in root.iter() for value in re.findall(r"(?:fill|stroke): ?([^;]+)", element.get("style", ""))}
    assert all(value in ("none", "currentColor") or value.startswith("var(") for value in drawn), drawn
    assert root.get("width") is None


@pytest.mark.parametrize("svg", [
    line_chart({}, title="t", x_label="x", y_label="y"), line_chart({"a": ([], [])}, title="t", x_label="x", y_label="y", log_y=True),
    histogram([], title="t", x_label="x", y_label="y", log_y=True), histogram([float("nan")], title="t", x_label="x", y_label="y"),
    bar_chart({}, title="t", x_label="x"), scatter_chart([], [], title="t", x_label="x", y_label="y", diagonal="d"),
])  # fmt: skip
def test_charts_of_nothing_say_so(svg: str) -> None:
    assert "no data" in "".join(ElementTree.fromstring(svg).itertext())


def test_a_log_axis_without_a_positive_value_stays_linear() -> None:
    ElementTree.fromstring(line_chart({"a": (XS, [0.0, 0.0, 0.0])}, title="t", x_label="x", y_label="y", log_y=True))


def test_a_scatter_of_many_points_draws_an_even_sample() -> None:
    many = np.linspace(0, 1, 50_000)
    assert len(scatter_chart(many, many, title="t", x_label="x", y_label="y", max_points=100)) < 40_000


def test_the_page_and_the_table_show_every_measure_the_cost_and_how_much_was_measured(report: Report) -> None:
    buffer = io.StringIO()
    print_table(report, Console(file=buffer, width=200))
    page, terminal = render_html(report), buffer.getvalue()
    for title in (*MEASURE_TITLES.values(), *(SLICE_TITLES[name] for name in report.slices)):
        assert title.replace("'", "&#39;") in page
    for parts in report.slices.values():
        assert all(part.label in page for part in parts)
    assert set(MEASURE_TITLES) == set(MEASURES)
    sentence = "Measured 20 of 20 probes and 0 of 20 problems of the task sample."
    for text in (page, terminal):
        for fragment in ("First token", "Peak memory", "Perplexity", "never a gate", sentence):
            assert fragment in text


def test_what_was_changed_or_left_out_is_said(report: Report) -> None:
    stopped = replace(report, coverage=Coverage(32, 256, 0, 20, "the probes fail clearly"), gates_changed={"gap_mean_fail": (1.5, 2.0)})
    assert measured_sentence(stopped) == (
        "Measured 32 of 256 probes and 0 of 20 problems of the task sample: the probes fail clearly (--full measures everything). "
        "Gates changed on the command line: gap_mean_fail = 2 instead of 1.5."
    )
    assert "gap_mean_fail = 2 instead of 1.5" in render_html(stopped)
