"""A run as one HTML file: curves, config, versions. Works offline, from `metrics.jsonl` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from deploy_targets.artifact import write_atomically
from deploy_targets.charts import line_chart
from hetero_rl.errors import RunFolderError
from hetero_rl.metrics import METRICS, PHASES, read_metrics
from hetero_rl.run_folder import CONFIG_FILE, ENVIRONMENT_FILE, PROFILE_FILE


def write_run_report(run: Path, out: Path) -> Path:
    """Draw the run in folder `run` into the HTML file `out`; returns `out`. Raises `RunFolderError` when there is nothing to draw."""
    try:
        rows = read_metrics(run)
        files = {name: json.loads((run / name).read_text("utf-8")) for name in (CONFIG_FILE, PROFILE_FILE, ENVIRONMENT_FILE)}
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{run} holds no run that can be drawn: {error}") from None
    if not rows:
        raise RunFolderError(f"run {run} has no metrics yet")
    environment = Environment(loader=PackageLoader("hetero_rl"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("run_report.html").render(
        name=run.resolve().name,
        tiles=tiles(rows),
        charts=charts(rows),
        config=json.dumps(files[CONFIG_FILE], indent=2),
        target=files[PROFILE_FILE],
        environment=files[ENVIRONMENT_FILE],
        glossary=[(name, metric.unit, metric.formula) for name, metric in METRICS.items()],
    )
    write_atomically(out, page.encode())
    return out


def tiles(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The numbers on top: (label, value, remark)."""
    evaluations = [row for row in rows if row.get("eval/deployed_accuracy") is not None and row.get("eval/learner_accuracy") is not None]
    last = rows[-1]
    found = [("steps", f"{last['step']}", f"weight version {last['weights/version']}")]
    if evaluations:
        first, final = evaluations[0], evaluations[-1]
        found.append(
            (
                "deployed accuracy",
                f"{final['eval/deployed_accuracy']:.1%}",
                f"from {first['eval/deployed_accuracy']:.1%}; bf16 learner {final['eval/learner_accuracy']:.1%}",
            )
        )
    gap = last.get("constraint/gap_ema") or last["constraint/engine_gap"]
    inside = "inside" if gap <= last["constraint/tolerance"] else "above"
    found.append(
        ("discrepancy", f"{gap:.4f}", f"{inside} the tolerance {last['constraint/tolerance']:.4f}; floor {last['constraint/floor']:.4f}")
    )
    found.append(
        ("lambda", f"{last['constraint/lambda']:.3f}", "infeasible: bounded" if last.get("constraint/infeasible") else "dual ascent")
    )
    seconds = sorted(row["perf/step_s"] - row.get("perf/eval_s", 0.0) for row in rows if "perf/step_s" in row)
    if seconds:
        found.append(("step", f"{seconds[len(seconds) // 2]:.2f} s", "median, evaluation left out"))
    return found


def charts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """SVG of every curve."""

    def curve(name: str) -> tuple[list[float], list[float]]:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return [x for x, _ in points], [y for _, y in points]

    last = rows[-1]
    bounds = {"tolerance": last["constraint/tolerance"], "floor": last["constraint/floor"]}
    per_token = "probability"
    return [
        line_chart(
            {"deployed": curve("eval/deployed_accuracy"), "bf16 learner": curve("eval/learner_accuracy")},
            title="Held-out accuracy", x_label="step", y_label="share solved", markers=True,
        ),
        line_chart({"reward": curve("reward/mean")}, title="Reward of the rollouts", x_label="step", y_label="mean reward"),
        line_chart(
            {"engine gap": curve("constraint/engine_gap"), "averaged": curve("constraint/gap_ema")},
            title="Discrepancy between learner and engine", x_label="step", y_label=per_token, horizontal=bounds,
        ),
        line_chart({"lambda": curve("constraint/lambda")}, title="Multiplier", x_label="step", y_label="lambda"),
        line_chart({name: curve(key) for name, key in PHASES.items()}, title="Where the seconds go", x_label="step", y_label="s"),
        line_chart({"entropy": curve("learner/entropy")}, title="Entropy of the learner", x_label="step", y_label="nats per token"),
    ]  # fmt: skip
