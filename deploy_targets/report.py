"""A report as one self-contained HTML page that works offline, and as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy_targets.bootstrap import Measure
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
    "gap_kinds": "The same on other probes",
    "nonfinite_share": "Non-finite log-probs",
    "kl_k3": "KL, k3 estimate (nats)",
    "greedy_agreement": "Greedy agreement",
    "accuracy_drop": "Accuracy drop since export",
    "settings": "Settings that differ",
    "weights": "Tensors that differ",
    "engine_checks": "Contradictions of the engine",
}
MEASURE_TITLES = {
    "abs_dp_mean": "|Δp|, mean",
    "abs_dp_p50": "|Δp|, median",
    "abs_dp_p99": "|Δp|, 99th percentile",
    "abs_dp_max": "|Δp|, maximum",
    "kl_k1": "KL(engine ‖ learner), k1 (nats)",
    "kl_k3": "KL(engine ‖ learner), k3 (nats)",
    "chi2": "χ²(learner ‖ engine)",
    "effective_share": "Effective sample size, share",
    "greedy_agreement": "Greedy agreement",
    "no_divergence_share": "Sequences whose greedy tokens never differ",
    "first_divergence_p50": "First greedy difference of the others, median position",
    "nonfinite_share": "Non-finite log-probs, share",
}
SLICE_TITLES = {
    "position": "By position in the response",
    "learner_probability": "By the learner's probability",
    "entropy": "By the learner's entropy (nats)",
    "token_class": "By token class",
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
    environment.filters.update(number=number, title=gate_title, interval=interval)
    return environment.get_template("report.html.jinja").render(
        report=report,
        manifest=report.manifest,
        gap=report.gap,
        measures=[(title, report.gap.measures[name]) for name, title in MEASURE_TITLES.items()],
        slices=[(SLICE_TITLES[name], parts) for name, parts in report.slices.items()],
        sentence=verdict_sentence(report),
        measured=measured_sentence(report),
        sentences=probe_sentences(report),
        marks=_MARKS,
        facts=headline_facts(report),
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
    for label, figure, note in _cost_facts(report):
        console.print(f"[dim]{label:<14}[/dim]{figure}  [dim]{escape(note)}[/dim]", highlight=False)
    for sentence in (measured_sentence(report), *probe_sentences(report)):
        console.print(escape(sentence), highlight=False, soft_wrap=True)
    if report.blame is not None:
        console.print(f"most likely cause: {escape(report.blame.sentence)}", highlight=False, soft_wrap=True)
    console.print(f"[{_STYLES[report.verdict]}]{report.verdict.upper()}[/] {verdict_sentence(report)}")


def verdict_sentence(report: Report) -> str:
    """The verdict in one sentence."""
    sentence = SENTENCES[report.verdict]
    return sentence if report.manifest.is_sealed else sentence.replace("what was trained", "the model that was probed")


def number(value: float | None) -> str:
    """A measured number for people: three significant digits, a dash where nothing was measured."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if np.isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"


def interval(measured: Measure | Gate) -> str:
    """The 95 % interval for people; a dash where there is none."""
    return NOTHING if measured.low is None or measured.high is None else f"{number(measured.low)} to {number(measured.high)}"


def probe_sentences(report: Report) -> list[str]:
    """The gap on probes of other kinds, how much of the gap the learner's own rounding explains, and what was not checked."""
    gaps = {kind: (gap.measure("abs_dp_mean", None).value, gap.num_tokens) for kind, gap in report.other_kinds.items()}
    kinds = ", ".join(f"{kind} {number(mean)} ({num_tokens:,} tokens)" for kind, (mean, num_tokens) in gaps.items())
    sentences = [f"Mean gap on other probes: {kinds}."] if kinds else []
    if (noise := noise_sentence(report)) is not None:
        sentences.append(noise)
    if not report.manifest.is_sealed:
        sentences.append(
            "No manifest: nothing says which bytes the artifact should have, so no hash was checked. "
            f"sha256 of the hashes of what was measured: {report.artifact_sha256}."
        )
    return sentences


def noise_sentence(report: Report) -> str | None:
    """What the gates are held against, and how much of the mean gap the learner's own rounding explains; None where that is not known."""
    noise = report.gap.learner_noise
    if noise is None:
        return None
    if report.learner_dtype == "float32":
        return "Gates are held against the learner's log-probs in float32, its own arithmetic: its rounding explains nothing of the gap."
    return (
        f"Gates are held against the learner's log-probs in {report.learner_dtype}, its own arithmetic, which lie "
        f"{number(noise.abs_dp.value)} from float32 (mean |Δp|). Held against float32 the mean gap is {number(noise.gap_to_fp32.value)}: "
        f"the learner's rounding explains {number(noise.explained.value)} of it (95 % interval {interval(noise.explained)})."
    )


def measured_sentence(report: Report) -> str:
    """How much was measured, and by which bounds it was judged."""
    coverage = report.coverage
    sentence = f"Measured {coverage.probes:,} of {coverage.num_probes:,} probes"
    if coverage.num_problems:
        sentence += f" and {coverage.problems:,} of {coverage.num_problems:,} problems of the task sample"
    sentence += f": {coverage.stopped} (--full measures everything)." if coverage.stopped else "."
    changed = ", ".join(f"{name} = {new:g} instead of {old:g}" for name, (old, new) in report.gates_changed.items())
    return f"{sentence} Gates changed on the command line: {changed}." if changed else sentence


def gate_title(gate: Gate) -> str:
    """The gate's name in words."""
    return GATE_TITLES.get(gate.name, gate.name)


def headline_facts(report: Report) -> list[tuple[str, str, str]]:
    """Headline figures for people: (label, figure, what it is held against)."""
    gap, task, manifest = report.gap, report.task, report.manifest
    mean, agreement = gap.measures["abs_dp_mean"], gap.measures["greedy_agreement"].value
    return [
        ("Mean gap", number(mean.value), "no interval" if mean.low is None else f"95 % interval {interval(mean)}"),
        ("Tolerance", number(manifest.tolerance), f"floor {number(manifest.floor)}"),
        ("Greedy agreement", NOTHING if agreement is None else f"{agreement:.1%}", f"{gap.num_tokens:,} probe tokens"),
        ("Task accuracy", NOTHING if task.accuracy is None else f"{task.accuracy:.1%}", _task_note(report)),
        *_cost_facts(report),
    ]


def _task_note(report: Report) -> str:
    recorded, pairs = report.manifest.task, report.task.paired()
    if report.task.accuracy is None:
        return "not measured"
    if pairs is None:
        at_export = "not measured at export" if recorded is None else f"{recorded.accuracy:.1%} at export"
        return f"{at_export}, {report.task.num_judged} problems"
    same = f"{pairs.accuracy_at_export:.1%} at export on the same {pairs.num_pairs} problems"
    return f"{same}; {pairs.lost} lost, {pairs.gained} gained, McNemar p = {number(pairs.p_value)}"


def _cost_facts(report: Report) -> list[tuple[str, str, str]]:
    """What serving costs, and the perplexities, which are no gate."""
    cost, (learner, engine) = report.cost, report.gap.perplexity
    first_token = None if cost.first_token_s is None else 1000 * cost.first_token_s
    return [
        ("Generation", number(cost.generate_tokens_per_s), "tokens/s, greedy"),
        ("First token", f"{number(first_token)} ms" if first_token is not None else NOTHING, "one prompt, after a warm-up"),
        ("Peak memory", _mebibytes(cost.peak_memory_bytes), "resident, this process and its children"),
        ("Weights", _mebibytes(cost.weights_bytes), "in the artifact"),
        ("Perplexity", number(engine), f"the learner's {number(learner)}; never a gate"),
    ]


def _mebibytes(size: int | None) -> str:
    return NOTHING if size is None else f"{number(size / 2**20)} MiB"


def _version_rows(report: Report) -> list[tuple[str, str, str]]:
    """(package, version at export, version here), packages of either side."""
    exported, here = report.manifest.package_versions, report.engine_versions
    return [(name, exported.get(name, NOTHING), here.get(name, NOTHING)) for name in sorted(exported.keys() | here.keys())]


def _machine_rows(report: Report) -> list[tuple[str, str, str]]:
    """(property, machine of the export, this machine)."""
    sides = (report.manifest.machine, report.machine)
    rows: list[tuple[str, ...]] = [
        ("CPU", *(machine.cpu for machine in sides)),
        ("Cores", *(str(machine.num_cores) for machine in sides)),
        ("Memory", *(f"{machine.memory_gib:g} GiB" for machine in sides)),
        ("GPUs", *(", ".join(machine.gpus) or "none" for machine in sides)),
        ("CPU features", *(", ".join(machine.cpu_features) or NOTHING for machine in sides)),
    ]
    return [(name, exported if report.manifest.is_sealed else NOTHING, here) for name, exported, here in rows]


def _charts(report: Report) -> list[tuple[str, str]]:
    """(SVG, caption) of every chart."""
    from deploy_targets.charts import bar_chart, histogram, line_chart, scatter_chart  # matplotlib takes a second to import

    gap, manifest, measured = report.gap, report.manifest, report.gap.measures["abs_dp_mean"]
    bars = {"floor": manifest.floor} if manifest.floor is not None else {}
    bars["tolerance"] = manifest.tolerance
    if manifest.final_gap is not None:
        bars["end of training"] = manifest.final_gap
    if measured.value is not None:
        bars["this machine"] = measured.value
    levels = {"tolerance": manifest.tolerance} | ({"mean": measured.value} if measured.value is not None else {})
    counts = np.bincount(gap.position) if gap.num_tokens else np.empty(0)
    sums = np.bincount(gap.position, weights=gap.abs_dp) if gap.num_tokens else np.empty(0)
    positions = np.flatnonzero(counts)
    return [
        (
            bar_chart(
                bars,
                title="Floor, tolerance, measured",
                x_label="mean |Δp|",
                intervals=_whisker(measured),
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
        *_layers_chart(report),
        *_kinds_chart(report),
        *_rewards_chart(report),
    ]


def _layers_chart(report: Report) -> list[tuple[str, str]]:
    """How far each tensor lies from the learner's, where the artifact knows; nothing where no tensor is rounded."""
    from deploy_targets.charts import line_chart

    layers = [layer for layer in report.inspection.layers if layer.error is not None and layer.error_at_export is not None]
    if not any(layer.error or layer.error_at_export for layer in layers):
        return []
    numbers = np.arange(len(layers))
    series = {name: (numbers, [getattr(layer, name) for layer in layers]) for name in ("error", "error_at_export")}
    chart = line_chart(
        {"here": series["error"], "at export": series["error_at_export"]},
        title="Weights, tensor by tensor",
        x_label="tensor, in the order of the model",
        y_label="distance / norm of the learner's",
    )
    return [(chart, "What rounding does to each tensor, estimated here and measured at export: a tensor that was changed stands out.")]


def _kinds_chart(report: Report) -> list[tuple[str, str]]:
    """The mean gap on each kind of probe, where there are several."""
    from deploy_targets.charts import bar_chart

    measured = {kind: gap.measure("abs_dp_mean") for kind, gap in {"policy": report.gap, **report.other_kinds}.items()}
    bars = {"tolerance": report.manifest.tolerance} | {kind: mean.value for kind, mean in measured.items() if mean.value is not None}
    whiskers = {kind: (mean.low, mean.high) for kind, mean in measured.items() if mean.low is not None and mean.high is not None}
    if not report.other_kinds:
        return []
    chart = bar_chart(bars, title="Gap by kind of probe", x_label="mean |Δp|", intervals=whiskers, highlight="policy")
    return [
        (
            chart,
            "The tolerance is about policy samples; a kind that stands out says where to look: long contexts, rare tokens, certain ones.",
        )
    ]


def _rewards_chart(report: Report) -> list[tuple[str, str]]:
    """Problems solved at export and here, where both are known."""
    from deploy_targets.charts import bar_chart

    pairs = report.task.paired()
    if pairs is None:
        return []
    on_both = round(pairs.accuracy_at_export * pairs.num_pairs) - pairs.lost
    bars = {
        "solved on both": on_both,
        "lost here": pairs.lost,
        "gained here": pairs.gained,
        "on neither": pairs.num_pairs - on_both - pairs.lost - pairs.gained,
    }
    chart = bar_chart(bars, title="Task, problem by problem", x_label="problems", highlight="lost here")
    return [(chart, "The same problems at export and on this machine: what was lost beyond what was gained is the drop.")]


def _whisker(measured: Measure) -> dict[str, tuple[float, float]]:
    return {} if measured.low is None or measured.high is None else {"this machine": (measured.low, measured.high)}
