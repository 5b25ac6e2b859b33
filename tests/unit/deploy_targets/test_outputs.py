"""What a report is written as: JSON by its schema, JUnit XML, Markdown, and two of them side by side; each read by a usual reader."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from junitparser import Error, Failure, JUnitXml
from markdown_it import MarkdownIt
from rich.console import Console

from deploy_targets.artifact import PROBES_FILE, check_artifact
from deploy_targets.ci_report import render_markdown, write_junit, write_markdown
from deploy_targets.comparison import compare, print_comparison, read_report, write_comparison
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.errors import UsageError
from deploy_targets.gates import Report
from deploy_targets.probes import read_probes
from deploy_targets.verify import verify
from tests.artifacts import VERSION, make_artifact
from tests.conftest import TinyModels

SHIFTS = {"pass": 1.001, "fail": 1.5}
NASTY = "a|b <script>\x00\n`x`"


@pytest.fixture(scope="module")
def reports(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    made = {}
    for verdict, shift in {**SHIFTS, "undecided": 1.001}.items():
        folder = tmp_path_factory.mktemp(verdict) / "artifact"
        num_sequences = 4 if verdict == "undecided" else 20
        make_artifact(tiny_models("qwen2"), folder, shift=lambda logps, by=shift: logps * np.float32(by), num_sequences=num_sequences)
        engine, manifest = FakeEngine(folder, {}, VERSION), check_artifact(folder)
        made[verdict] = verify(
            folder, engine, manifest, read_probes(folder / PROBES_FILE), reward=lambda p, c, k: [1.0] * len(p), full=True
        )
    return made


def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((resources.files("deploy_targets") / "schemas" / "verify-report-1.json").read_text("utf-8"))
    return loaded


@pytest.mark.parametrize("verdict", ["pass", "fail", "undecided"])
def test_json_is_what_its_schema_says(reports: dict[str, Report], verdict: str) -> None:
    report = json.loads(json.dumps(reports[verdict].to_json(), allow_nan=False))
    assert report["verdict"] == verdict
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(report, schema(), cls=jsonschema.Draft202012Validator)


def test_the_schema_misses_nothing(reports: dict[str, Report]) -> None:
    """Without any one of its keys, or with another one, at any depth, a report is refused."""
    validator = jsonschema.Draft202012Validator(schema())
    report = json.loads(json.dumps(reports["pass"].to_json()))
    for key in report:
        assert not validator.is_valid({name: value for name, value in report.items() if name != key}), key
    for table in ("gap", "measured", "cost", "hardware", "engine", "learner", "perplexity"):
        for key in report[table]:
            assert not validator.is_valid({**report, table: {name: value for name, value in report[table].items() if name != key}}), (
                table,
                key,
            )
        assert not validator.is_valid({**report, table: {**report[table], "other": 1}}), table
    assert not validator.is_valid({**report, "other": 1})


@pytest.mark.parametrize(("verdict", "kind"), [("pass", None), ("fail", Failure), ("undecided", Error)])
def test_junit(reports: dict[str, Report], verdict: str, kind: type | None, tmp_path: Path) -> None:
    report = reports[verdict]
    write_junit(report, tmp_path / "junit.xml")
    suites = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    [suite] = list(suites)
    cases = {case.name: [type(result) for result in case.result] for case in suite}
    expected = {"pass": [], "warn": [], "fail": [Failure], "undecided": [Error]}
    assert cases == {gate.name: expected[gate.verdict] for gate in report.gates}
    assert kind is None or [kind] in cases.values()
    assert (suite.tests, suite.failures, suite.errors) == (len(cases), *(list(cases.values()).count([k]) for k in (Failure, Error)))
    assert {prop.name: prop.value for prop in suite.properties()}["artifact_sha256"] == report.artifact_sha256


def test_names_from_outside_break_no_format(reports: dict[str, Report], tmp_path: Path) -> None:
    report = reports["fail"]
    odd = replace(report, manifest=report.manifest.model_copy(update={"source_model": NASTY}), engine_versions={NASTY: NASTY})
    write_junit(odd, tmp_path / "junit.xml")
    [suite] = list(JUnitXml.fromfile(str(tmp_path / "junit.xml")))
    assert any("<script>" in (prop.value or "") for prop in suite.properties())
    html = MarkdownIt("gfm-like", {"linkify": False}).render(render_markdown(odd))
    assert "<script>" not in html
    assert "a|b &lt;script&gt;" in html


def test_markdown(reports: dict[str, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = reports["fail"]
    html = MarkdownIt("gfm-like", {"linkify": False}).render(render_markdown(report))
    assert html.count("<table>") == 3
    assert html.count("<td") == 7 * len(report.gates) + 3 * 9 + 2 * 7
    path = tmp_path / "summary.md"
    for _ in range(2):
        write_markdown(report, path)
    assert path.read_text("utf-8") == render_markdown(report)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    write_markdown(report, path)
    assert path.read_text("utf-8") == 2 * render_markdown(report)


def test_two_side_by_side(reports: dict[str, Report], tmp_path: Path) -> None:
    for name in SHIFTS:
        (tmp_path / name).write_text(json.dumps(reports[name].to_json()))
    good, bad = (read_report(tmp_path / name) for name in SHIFTS)
    rows = {row.title: row for section in compare(good, bad) for row in section.rows}
    assert rows["|Δp|, mean"].apart
    assert rows["|Δp|, mean"].difference == pytest.approx(bad["gap"]["mean"] - good["gap"]["mean"])
    assert (rows["Greedy agreement"].apart, rows["Greedy agreement"].difference) == (False, 0)
    assert (rows["verdict"].a, rows["verdict"].b) == ("pass", "fail")
    assert not any(row.apart for section in compare(good, good) for row in section.rows)
    buffer = io.StringIO()
    print_comparison(compare(good, bad), Console(file=buffer, width=160))
    assert "intervals apart" in buffer.getvalue()
    write_comparison(good, bad, tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text("utf-8")
    assert page.count("<table") == 4
    assert "intervals apart" in page
    assert ">A: pass<" in page
    assert ">B: fail<" in page


def test_side_by_side_only_versions_that_differ_and_the_server_that_was_asked(reports: dict[str, Report]) -> None:
    a = reports["pass"].to_json()
    b = copy.deepcopy(a)
    b["engine"]["versions"] |= {"numpy": "0.1", "other": "2"}
    b["engine"]["server"] = {"url": "http://box:1"}
    b["blame"] = {"sentence": "it is the cache"}
    b["cost"]["weights_bytes"] = 3 << 20
    a["cost"]["weights_bytes"] = 1 << 20
    rows = {row.title: row for section in compare(a, b) for row in section.rows}
    assert (rows["numpy"].b, rows["other"].a, rows["other"].b) == ("0.1", "\N{EN DASH}", "2")
    assert "safetensors" not in rows
    assert rows["engine"].b == f"{rows['engine'].a} at http://box:1"
    assert rows["most likely cause"].b == "it is the cache"
    assert (rows["Weights (MiB)"].a, rows["Weights (MiB)"].difference) == ("1", 2.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "verify-report-9"}', "\x00", "[" * 100_000])
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=r"r\.json.*verify-deploy --json"):
        read_report(tmp_path / "r.json")


def test_a_report_that_was_changed_by_hand(reports: dict[str, Report]) -> None:
    report = reports["pass"].to_json()
    with pytest.raises(UsageError, match="lacks 'cost'"):
        compare(report, {name: value for name, value in report.items() if name != "cost"})
