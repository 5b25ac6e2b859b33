"""Measurements -> verdict: the gates, and the report they make.

A gate has three levels, and holds the interval of a measure against two bounds:

    fail        the whole interval lies beyond the fail bound
    undecided   the value lies beyond the fail bound but its interval does not; or the value lies beyond the warn bound, and the interval
                reaches beyond fail and rests on fewer than 30 sequences; or there are fewer than 200 tokens or 8 (different) sequences
    warn        the value lies beyond the warn bound
    pass        it does not

Non-finite log-probs are counted, not estimated: their share is held against the bounds as it is. The worst gate is the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deploy_targets.bootstrap import CONFIDENCE, Floats, Measure, measure, ratio
from deploy_targets.engine_checks import EngineCheck
from deploy_targets.errors import EXIT_GATE, EXIT_UNDECIDED
from deploy_targets.gap import Gap, Slice
from deploy_targets.inspection import Activations, Inspection, some
from deploy_targets.manifest import Manifest
from deploy_targets.paired import SOLVED, Paired, compare_pairs, reward_drop, unpaired_drop
from deploy_targets.profile import LOWER_BOUNDED, GateSpec
from deploy_targets.serving_cost import ServingCost
from deploy_targets.types import Machine, Server

if TYPE_CHECKING:
    from deploy_targets.blame import Blame

Verdict = Literal["pass", "warn", "undecided", "fail"]
VERDICTS: tuple[Verdict, ...] = ("pass", "warn", "undecided", "fail")
"""From best to worst."""
NO_KINDS: Mapping[str, Gap] = MappingProxyType({})
EXIT_CODES: Mapping[Verdict, int] = {"pass": 0, "warn": 0, "undecided": EXIT_UNDECIDED, "fail": EXIT_GATE}

FORMAT = "verify-report-1"
"""Of the report as JSON; its schema is `schemas/verify-report-1.json`."""
MIN_PROBE_TOKENS = 200
"""With fewer finite probe tokens the gates on the gap decide nothing."""
MIN_SEQUENCES = 8
"""With fewer sequences (or problems) an interval says nothing, and no gate decides."""
FEW_SEQUENCES = 30
"""With fewer, an interval that reaches beyond fail leaves a warning undecided."""
NONFINITE_FAIL_SHARE = 0.01


@dataclass(frozen=True)
class TaskResult:
    """Rewards of greedy responses on this machine, float64 [num_judged], and those `expected` of the same problems from the export.

    `expected` holds NaN where the export gave no reward; it is None where the artifact does not say what it got.
    """

    rewards: Floats = field(default_factory=lambda: np.empty(0))
    expected: Floats | None = None

    @property
    def num_judged(self) -> int:
        """Responses that have a reward."""
        return len(self.rewards)

    @property
    def accuracy(self) -> float | None:
        """Share of the rewards that count as solved; None where none was measured."""
        return float((self.rewards >= SOLVED).mean()) if self.num_judged else None

    @property
    def reward_drop(self) -> Measure:
        """Mean reward at export minus that here, problem by problem."""
        return reward_drop(np.full(self.num_judged, math.nan) if self.expected is None else self.expected, self.rewards)

    def paired(self, confidence: float = CONFIDENCE) -> Paired | None:
        """This machine against the export, problem by problem; None where no problem has both rewards."""
        if self.expected is None:
            return None
        known = ~np.isnan(self.expected)
        return compare_pairs(self.expected[known], self.rewards[known], confidence) if known.any() else None


@dataclass(frozen=True)
class Gate:
    """One comparison of a measure and its interval, `low` to `high`, with two bounds; `detail` says what was compared."""

    name: str
    value: float | None
    warn: float
    fail: float
    verdict: Verdict
    detail: str
    low: float | None = None
    high: float | None = None

    def level(self, value: float) -> Verdict:
        """Where `value` lies: beyond fail, beyond warn, or neither."""
        sign = -1 if self.name in LOWER_BOUNDED else 1
        return "fail" if sign * value > sign * self.fail else "warn" if sign * value > sign * self.warn else "pass"

    @property
    def settled_level(self) -> Verdict | None:
        """The level that the whole interval lies within; None where it lies within none, or there is no interval."""
        if self.low is None or self.high is None:
            return None
        level = self.level(self.low)
        return level if level == self.level(self.high) else None


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much was measured, of how much; `stopped` says why not all, and is empty where it was all."""

    probes: int
    num_probes: int
    problems: int
    num_problems: int
    stopped: str = ""


@dataclass(frozen=True)
class Report:
    """Everything `verify` found out. `slices`: what the tokens are sorted by -> the gap on each part of them.

    `gap` is that on policy samples, which the tolerance is about; `other_kinds`: kind of probe -> the gap on it. All gates rest
    on log-probs in the learner's own arithmetic, `learner_dtype` (empty where the probes do not say), which training was held against.
    `gates_changed`: bounds that were given on the command line -> (the artifact's, the one used).
    """

    verdict: Verdict
    gap: Gap
    other_kinds: Mapping[str, Gap]
    learner_dtype: str
    task: TaskResult
    gates: tuple[Gate, ...]
    artifact_sha256: str
    engine_versions: dict[str, str]
    machine: Machine
    manifest: Manifest
    temperature: float
    seconds: float
    created: str
    slices: Mapping[str, tuple[Slice, ...]]
    cost: ServingCost
    coverage: Coverage
    gates_changed: Mapping[str, tuple[float, float]]
    server: Server | None = None
    """The server that was asked, where none was started here: `machine` is then only the machine that asked."""
    inspection: Inspection = field(default_factory=Inspection)
    checks: tuple[EngineCheck, ...] = ()
    blame: Blame | None = None
    """Of a report that does not pass: see blame.py."""
    activations: Activations | None = None
    """The comparison of `--bisect`."""

    @property
    def engine_name(self) -> str:
        """The engine that was started here, or the software of the server that was asked."""
        return self.manifest.profile.engine.name if self.server is None else self.server.software

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values (`schemas/verify-report-1.json`); what is infinite or was not measured is null.

        blame             null, or {"kind", "name", "explains", "detail", "sentence"} of the most likely cause; see blame.py
        blame_looked_at   [{"kind", "name", "holds", "explains", "detail"}], everything that was looked at
        layers            [{"name", "shape", "storage", "error", "error_at_export", "changed", "nonfinite", "problem"}], one for each tensor
        settings          {"num_compared", "different": [{"name", "title", "expected", "found"}]}
        activations       null, or {"num_sequences", "first": name or null, "modules": [{"name", "local_error", "error", "departs"}]}
        engine_checks     [{"name", "passed", "detail", "cause"}], `passed` null where the engine could not be asked
        """
        profile, recorded = self.manifest.profile, self.manifest.task
        measures, pairs = self.gap.measures, self.task.paired()
        engine = {
            "name": self.engine_name,
            "versions": self.engine_versions,
            "options": {"max_model_len": profile.max_model_len, **profile.engine.options} if self.server is None else None,
            "weight_version": self.manifest.weight_version,
            "server": None if self.server is None else asdict(self.server),
        }
        mean = measures["abs_dp_mean"]
        fields = {
            "format": FORMAT,
            "target": profile.name,
            "model": self.manifest.source_model,
            "verdict": self.verdict,
            "gap": {
                **{name: measures[f"abs_dp_{name}"].value for name in ("mean", "p50", "p99", "max")},
                "interval": None if mean.low is None else [mean.low, mean.high],
                "num_tokens": self.gap.num_tokens,
                "num_sequences": self.gap.num_sequences,
                "nonfinite": self.gap.num_nonfinite,
            },
            "kl_k3": measures["kl_k3"].value,
            "kl_k1": measures["kl_k1"].value,
            "greedy_agreement": measures["greedy_agreement"].value,
            "measures": {name: asdict(measured) for name, measured in measures.items()},
            "slices": {name: [asdict(part) for part in parts] for name, parts in self.slices.items()},
            "perplexity": dict(zip(("learner", "engine"), self.gap.perplexity, strict=True)),
            "other_kinds": {kind: _kind_json(gap) for kind, gap in self.other_kinds.items()},
            "learner": {"dtype": self.learner_dtype or None, "noise": _noise_json(self.gap)},
            "task_accuracy": self.task.accuracy,
            "task_accuracy_at_export": recorded.accuracy if recorded else None,
            "task_paired": None if pairs is None else {**asdict(pairs), "reward_drop": asdict(self.task.reward_drop)},
            "gates": [asdict(gate) for gate in self.gates],
            "blame": None if self.blame is None else self.blame.to_json(),
            "blame_looked_at": [] if self.blame is None else self.blame.looked_at_json(),
            "layers": [asdict(layer) for layer in self.inspection.layers],
            "settings": {
                "num_compared": self.inspection.num_settings,
                "different": [{**asdict(difference), "title": difference.title} for difference in self.inspection.settings],
            },
            "activations": None if self.activations is None else _activations_json(self.activations),
            "engine_checks": [asdict(check) for check in self.checks],
            "gates_changed": {name: {"artifact": f"{old:g}", "used": f"{new:g}"} for name, (old, new) in self.gates_changed.items()},
            "measured": asdict(self.coverage),
            "artifact_sha256": self.artifact_sha256,
            "hashes_checked": self.manifest.is_sealed,
            "engine": engine,
            "hardware": asdict(self.machine),
            "floor": self.manifest.floor,
            "tolerance": self.manifest.tolerance,
            "cost": asdict(self.cost),
            "generate_tokens_per_s": self.cost.generate_tokens_per_s,
            "seconds": self.seconds,
            "created": self.created,
        }
        plain: dict[str, Any] = _plain(fields)
        return plain


def worst(gates: Iterable[Gate]) -> Verdict:
    """The worst verdict of all gates, in the order of `VERDICTS`."""
    return max((gate.verdict for gate in gates), key=VERDICTS.index, default="undecided")


def judge(
    manifest: Manifest,
    gap: Gap,
    task: TaskResult,
    *,
    others: Mapping[str, Gap] = NO_KINDS,
    gates: GateSpec | None = None,
    confidence: float = CONFIDENCE,
) -> tuple[Gate, ...]:
    """Hold the measurements against `gates`, by default those of the manifest's profile, with intervals of `confidence`.

    `gap` is that on policy samples, `others` those on probes of other kinds. An accuracy that was not measured has no gate.
    """
    spec = gates or manifest.profile.gates
    return *judge_gap(spec, manifest.tolerance, gap, confidence, others), *judge_task(spec, manifest, task, confidence)


def judge_gap(
    spec: GateSpec, tolerance: float, gap: Gap, confidence: float | None = CONFIDENCE, others: Mapping[str, Gap] = NO_KINDS
) -> tuple[Gate, ...]:
    """The gates on the probes; `confidence` None: without intervals, which is quick and leaves all but the counted one undecided.

    The bounds are made for `gap`, that on policy samples. Of the `others`, which lie apart in what they ask, the worst is held against
    the bounds of the mean gap, and every log-prob has to be finite.
    """
    few = _too_few(gap)
    mean, kl, agreement = (gap.measure(name, confidence) for name in ("abs_dp_mean", "kl_k3", "greedy_agreement"))
    return (
        judge_measure(spec, "gap_mean", _in_units_of(mean, tolerance), f"mean abs(dp) / tolerance {tolerance:.4g}", few),
        *_kinds_gate(spec, tolerance, others, confidence),
        _nonfinite_gate([gap, *others.values()], confidence),
        judge_measure(spec, "kl_k3", kl, "k3 estimate of KL(engine || learner), nats per token", few),
        judge_measure(spec, "greedy_agreement", agreement, "share of probe tokens with the same most probable token", few),
    )


def judge_task(spec: GateSpec, manifest: Manifest, task: TaskResult, confidence: float = CONFIDENCE) -> tuple[Gate, ...]:
    """The gate on the accuracy, where it was measured here and at export: of pairs of rewards where there are some, else of the shares."""
    recorded = manifest.task
    if task.accuracy is None or recorded is None:
        return ()
    pairs = task.paired(confidence)
    if pairs is None:
        drop = unpaired_drop(recorded.accuracy, recorded.num_problems, task.accuracy, task.num_judged, confidence)
        return (judge_measure(spec, "accuracy_drop", drop, f"{recorded.accuracy:.3f} at export, {task.accuracy:.3f} here; not paired"),)
    changed = f"{pairs.lost} solved at export are not solved here, {pairs.gained} the other way; McNemar p = {pairs.p_value:.3g}"
    return (judge_measure(spec, "accuracy_drop", pairs.drop, f"paired by problem: {changed}"),)


def judge_inspection(inspection: Inspection) -> tuple[Gate, ...]:
    """The gates on settings and weights; none for an artifact without a fingerprint. One that differs is a fail."""
    if not inspection.num_settings:
        return ()
    gates = [_count_gate("settings", list(map(str, inspection.settings)), f"all {inspection.num_settings} settings are as exported")]
    if inspection.layers:
        changed = [f"{layer.name} {layer.problem}" for layer in inspection.changed_layers]
        gates.append(_count_gate("weights", changed, f"all {len(inspection.layers)} tensors are as exported"))
    return tuple(gates)


def judge_checks(checks: Sequence[EngineCheck]) -> tuple[Gate, ...]:
    """The gate on the questions to the engine; none where none was asked."""
    failed = [f"{check.cause} ({check.detail})" for check in checks if check.passed is False]
    num_asked = sum(check.passed is not None for check in checks)
    return (_count_gate("engine_checks", failed, f"{num_asked} of {len(checks)} questions asked, no contradiction"),) if checks else ()


def _count_gate(name: str, problems: list[str], otherwise: str) -> Gate:
    gate = Gate(name, float(len(problems)), 0.0, 0.0, "pass", some(problems) or otherwise)
    return replace(gate, verdict=gate.level(len(problems)))


def judge_measure(spec: GateSpec, name: str, measured: Measure, detail: str, too_few: str = "") -> Gate:
    """The gate of the bounds `name`_warn and `name`_fail on `measured`; it is undecided where `too_few` says why."""
    units = "problems" if name == "accuracy_drop" else "sequences"
    bounds = getattr(spec, f"{name}_warn"), getattr(spec, f"{name}_fail")
    if measured.value is None or measured.low is None or measured.high is None:
        reason = too_few or ("; not measured" if measured.value is None else f"; two {units} are needed for an interval")
        return Gate(name, measured.value, *bounds, "undecided", detail + reason)
    gate = Gate(name, measured.value, *bounds, "undecided", detail, measured.low, measured.high)
    interval = f"95 % interval [{measured.low:.3g}, {measured.high:.3g}] over {measured.num_sequences} {units}"
    verdict, why = _verdict(gate, measured.num_sequences, units)
    infinite = "; the value is infinite" if math.isinf(measured.value) else ""
    return replace(gate, verdict="undecided" if too_few else verdict, detail=f"{detail}; {interval}{too_few or why}{infinite}")


def _verdict(gate: Gate, num_sequences: int, units: str) -> tuple[Verdict, str]:
    """The rule at the top of this file, and what there is to say about its outcome."""
    assert gate.value is not None
    assert gate.low is not None
    assert gate.high is not None
    if num_sequences < MIN_SEQUENCES:
        return "undecided", f"; {MIN_SEQUENCES} {units} are needed to decide"
    if gate.settled_level == "fail":
        return "fail", ""
    level, reaches = gate.level(gate.value), "fail" in (gate.level(gate.low), gate.level(gate.high))
    if level == "fail":
        return "undecided", f"; the value is beyond fail, its interval is not: more {units} would decide"
    if level == "warn" and reaches and num_sequences < FEW_SEQUENCES:
        return "undecided", f"; the interval reaches beyond fail, and {FEW_SEQUENCES} {units} are needed to leave it at a warning"
    return level, ""


def _kinds_gate(spec: GateSpec, tolerance: float, others: Mapping[str, Gap], confidence: float | None) -> list[Gate]:
    """The gate of the worst kind of probe, each with its part of the error; none where every kind is too small to decide."""
    enough = {kind: gap for kind, gap in others.items() if gap.num_sequences >= MIN_SEQUENCES and not _too_few(gap)}
    share = None if confidence is None else 1 - (1 - confidence) / max(1, len(enough))
    judged = {
        kind: judge_measure(spec, "gap_mean", _in_units_of(gap.measure("abs_dp_mean", share), tolerance), f"mean abs(dp) on {kind} probes")
        for kind, gap in enough.items()
    }
    if not judged:
        return []
    gate = max(judged.values(), key=lambda gate: (VERDICTS.index(gate.verdict), gate.value or 0.0))
    return [replace(gate, name="gap_kinds", detail=f"worst of {', '.join(judged)}: {gate.detail}")]


def _nonfinite_gate(gaps: Sequence[Gap], confidence: float | None) -> Gate:
    counts = np.stack([np.concatenate([getattr(gap, name) for gap in gaps]) for name in ("nonfinite", "scored")], axis=1).astype(float)
    measured, (num_nonfinite, total) = measure(ratio, counts, confidence), counts.sum(0).astype(int)
    share = 1.0 if measured.value is None else measured.value
    detail = f"{num_nonfinite} of {total} engine log-probs are not finite; they are left out of every other measure"
    gate = Gate("nonfinite_share", share, 0.0, NONFINITE_FAIL_SHARE, "undecided", detail, measured.low, measured.high)
    return replace(gate, verdict=gate.level(share))


def _too_few(gap: Gap) -> str:
    """Why the probes decide nothing, or an empty string; too few sequences are every gate's own matter."""
    if gap.num_tokens < MIN_PROBE_TOKENS:
        return f"; only {gap.num_tokens} finite probe tokens, {MIN_PROBE_TOKENS} are needed to decide"
    if gap.num_different is not None and gap.num_different < MIN_SEQUENCES <= gap.num_sequences:
        return f"; the probes are {gap.num_different} different sequences over and over, {MIN_SEQUENCES} are needed to decide"
    return ""


def _in_units_of(measured: Measure, tolerance: float) -> Measure:
    """`measured` divided by `tolerance`; one of zero is met by zero only."""

    def scaled(x: float | None) -> float | None:
        return None if x is None else x / tolerance if tolerance > 0 else 0.0 if x == 0 else math.inf

    return Measure(scaled(measured.value), scaled(measured.low), scaled(measured.high), measured.num_sequences)


def _activations_json(activations: Activations) -> dict[str, Any]:
    return {**asdict(activations), "first": None if activations.first is None else activations.first.name}


def _kind_json(gap: Gap) -> dict[str, Any]:
    counts = {"num_tokens": gap.num_tokens, "num_sequences": gap.num_sequences, "nonfinite": gap.num_nonfinite}
    measures = {name: asdict(gap.measure(name)) for name in ("abs_dp_mean", "kl_k3", "greedy_agreement")}
    return {**counts, **measures, "learner_noise": _noise_json(gap)}


def _noise_json(gap: Gap) -> dict[str, Any] | None:
    return None if gap.learner_noise is None else asdict(gap.learner_noise)


def _plain(value: Any) -> Any:
    """`value` with tuples as lists and non-finite floats as None, which every JSON reader understands."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
