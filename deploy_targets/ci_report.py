"""A report for the readers of a CI job: JUnit XML, one test case to a gate, and a Markdown summary."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from deploy_targets.gates import Gate, Report, Verdict
from deploy_targets.report import gate_title, headline_facts, measured_sentence, number, probe_sentences, verdict_sentence

_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~])")
_NOT_PASSED: Mapping[Verdict, str] = {"fail": "failure", "undecided": "error"}
STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable with the file that GitHub shows under a job; its steps append to it."""


def write_junit(report: Report, path: Path) -> None:
    """One test suite, one test case to a gate: a failed gate is a failure, an undecided one an error, a warning passes with its text."""
    suite = ElementTree.Element("testsuite", name=f"verify-deploy {_text(report.manifest.profile.name)}", timestamp=report.created)
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _identity(report).items():
        ElementTree.SubElement(properties, "property", name=name, value=_text(value))
    for gate in report.gates:
        case = ElementTree.SubElement(suite, "testcase", name=gate.name, classname=suite.attrib["name"].replace(" ", "."), time="0")
        if gate.verdict in _NOT_PASSED:
            kind = _NOT_PASSED[gate.verdict]
            ElementTree.SubElement(case, kind, type=gate.verdict, message=_text(gate.detail)).text = _text(_bounds(gate))
        else:
            ElementTree.SubElement(case, "system-out").text = _text(f"{gate.verdict}: {_bounds(gate)}; {gate.detail}")
    counts = {kind: len(suite.findall(f"testcase/{kind}")) for kind in _NOT_PASSED.values()}
    suite.attrib |= {"tests": str(len(report.gates)), "failures": str(counts["failure"]), "errors": str(counts["error"]), "skipped": "0"}
    suite.attrib["time"] = f"{report.seconds:.3f}"
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    path.write_bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def write_markdown(report: Report, path: Path) -> None:
    """The summary as GitHub-flavoured Markdown; where `path` is the step summary of a GitHub job, after what is there already."""
    appends = bool(os.environ.get(STEP_SUMMARY)) and path == Path(os.environ[STEP_SUMMARY])
    with open(path, "a" if appends else "w", encoding="utf-8") as file:
        file.write(render_markdown(report))


def render_markdown(report: Report) -> str:
    """Verdict, gates with intervals and bounds, headline figures, and what was measured."""
    target = _escaped(report.manifest.profile.name)
    gates = [
        (_escaped(gate_title(gate)), *map(number, (gate.value, gate.low, gate.high, gate.warn, gate.fail)), f"**{gate.verdict}**")
        for gate in report.gates
    ]
    open_gates = [gate for gate in report.gates if gate.verdict != "pass"]
    parts = [
        f"## verify-deploy {target}: {report.verdict}",
        _escaped(verdict_sentence(report)),
        *([] if report.blame is None else [f"**Most likely cause:** {_escaped(report.blame.sentence)}"]),
        *(f"- {_escaped(gate_title(gate))}, {gate.verdict}: {_escaped(gate.detail)}" for gate in open_gates),
        _table(("gate", "measured", "95 % from", "to", "warn beyond", "fail beyond", "verdict"), gates),
        _table(("figure", "here", "held against"), [tuple(map(_escaped, fact)) for fact in headline_facts(report)]),
        _escaped(" ".join((measured_sentence(report), *probe_sentences(report)))),
        _table(("of", "what"), [(name, _escaped(value)) for name, value in _identity(report).items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _identity(report: Report) -> dict[str, str]:
    manifest, machine = report.manifest, report.machine
    return {
        "verdict": report.verdict,
        "model": manifest.source_model,
        "weight_version": str(manifest.weight_version),
        "artifact_sha256": report.artifact_sha256,
        "engine": report.engine_name,
        "versions": ", ".join(f"{name} {version}" for name, version in report.engine_versions.items()),
        **({} if report.blame is None else {"most_likely_cause": report.blame.sentence}),
        "machine": f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_gib:g} GiB, GPUs: {', '.join(machine.gpus) or 'none'}",
    }


def _bounds(gate: Gate) -> str:
    between = "" if gate.low is None else f" [{number(gate.low)}, {number(gate.high)}]"
    return f"{gate_title(gate)} {number(gate.value)}{between}, warn beyond {number(gate.warn)}, fail beyond {number(gate.fail)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """`text` as Markdown that shows it as it is, in one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _text(text: str) -> str:
    """`text` without the characters that XML cannot hold."""
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
