"""Measurements -> verdict: the closed-form measures of the gap, the gates as plain comparisons, and the report they make.

Formulas, over the finite response tokens of the probes, with d = learner_logp - engine_logp:

    gap          mean, p50, p99, max of abs(exp(learner_logp) - exp(engine_logp))
    kl_k1        mean of -d                 estimate of KL(engine || learner), unbiased, signed
    kl_k3        mean of exp(d) - 1 - d     estimate of the same, never negative, low variance

k1 and k3 are those of http://joschu.net/blog/kl-approx.html with q = engine, p = learner, r = p/q = exp(d). They are unbiased where the
tokens were sampled by the engine at the probes' temperature; on tokens from elsewhere they are distances only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deploy_targets.manifest import Manifest
from deploy_targets.types import Machine, Server

Verdict = Literal["pass", "warn", "undecided", "fail"]
VERDICTS: tuple[Verdict, ...] = ("pass", "warn", "undecided", "fail")
"""From best to worst."""

MIN_PROBE_TOKENS = 200
"""With fewer finite probe tokens the gates on the gap decide nothing."""
NONFINITE_FAIL_SHARE = 0.01
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Gap:
    """Per-token arrays of the finite probe positions, and the measures made of them.

    `learner_logps`, `engine_logps`: float64 [num_tokens], nats. `greedy_agrees`: bool [num_tokens]. `sequence_index`, `position`
    (in the response): int [num_tokens]. `num_nonfinite`: positions left out because the engine's log-prob was not finite.
    """

    learner_logps: NDArray[np.float64]
    engine_logps: NDArray[np.float64]
    greedy_agrees: NDArray[np.bool_]
    sequence_index: NDArray[np.int_]
    position: NDArray[np.int_]
    num_nonfinite: int

    @property
    def num_tokens(self) -> int:
        """Finite tokens."""
        return len(self.engine_logps)

    @property
    def num_sequences(self) -> int:
        """Sequences with at least one finite token."""
        return len(np.unique(self.sequence_index))

    @cached_property
    def abs_dp(self) -> NDArray[np.float64]:
        """abs(p_learner - p_engine) of each token."""
        difference: NDArray[np.float64] = np.exp(self.learner_logps) - np.exp(self.engine_logps)
        return np.abs(difference)

    @property
    def mean(self) -> float | None:
        """Mean abs(p_learner - p_engine); None without a finite token."""
        return float(self.abs_dp.mean()) if self.num_tokens else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of `mean` over sequences (tokens of one sequence are not independent), seeded.

        None with fewer than two sequences: one sequence says nothing about the spread between sequences.
        """
        if self.num_sequences < 2:
            return None
        counts = np.bincount(self.sequence_index)
        sums = np.bincount(self.sequence_index, weights=self.abs_dp)[counts > 0]
        counts = counts[counts > 0]
        draws = np.random.default_rng(0).integers(len(counts), size=(_NUM_RESAMPLES, len(counts)))
        low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
        return float(low), float(high)

    @property
    def kl_k1(self) -> float | None:
        """Mean of engine_logp - learner_logp, nats."""
        return float((self.engine_logps - self.learner_logps).mean()) if self.num_tokens else None

    @property
    def kl_k3(self) -> float | None:
        """Mean of exp(d) - 1 - d with d = learner_logp - engine_logp, nats; infinite where exp overflows."""
        if not self.num_tokens:
            return None
        log_ratio = self.learner_logps - self.engine_logps
        with np.errstate(over="ignore"):
            return float((np.expm1(log_ratio) - log_ratio).mean())

    @property
    def greedy_agreement(self) -> float | None:
        """Share of tokens at which both sides have the same most probable token."""
        return float(self.greedy_agrees.mean()) if self.num_tokens else None

    def to_json(self) -> dict[str, Any]:
        """The summary numbers, without the arrays."""
        p50, p99, top = (float(v) for v in np.percentile(self.abs_dp, [50, 99, 100])) if self.num_tokens else (None, None, None)
        interval = list(self.interval) if self.interval else None
        counts = {"num_tokens": self.num_tokens, "num_sequences": self.num_sequences, "nonfinite": self.num_nonfinite}
        return {"mean": self.mean, "p50": p50, "p99": p99, "max": top, "interval": interval, **counts}


@dataclass(frozen=True)
class TaskResult:
    """Task accuracy on the target (None where it was not measured), completions judged, and the speed of greedy generation."""

    accuracy: float | None
    num_judged: int
    generate_tokens_per_s: float


@dataclass(frozen=True)
class Gate:
    """One comparison. `value` beyond `warn` is a warning, beyond `fail` a failure; `detail` says what was compared."""

    name: str
    value: float | None
    warn: float
    fail: float
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class Report:
    """Everything `verify` found out."""

    verdict: Verdict
    gap: Gap
    task: TaskResult
    gates: tuple[Gate, ...]
    artifact_sha256: str
    engine_versions: dict[str, str]
    machine: Machine
    manifest: Manifest
    temperature: float
    seconds: float
    created: str
    server: Server | None = None
    """The server that was asked, where none was started here: `machine` is then only the machine that asked."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; a number that is infinite or was not measured is null."""
        profile, recorded = self.manifest.profile, self.manifest.task
        engine = {
            "name": profile.engine.name if self.server is None else self.server.software,
            "versions": self.engine_versions,
            "options": {"max_model_len": profile.max_model_len, **profile.engine.options} if self.server is None else None,
            "weight_version": self.manifest.weight_version,
            "server": None if self.server is None else asdict(self.server),
        }
        fields = {
            "verdict": self.verdict,
            "gap": self.gap.to_json(),
            "kl_k3": self.gap.kl_k3,
            "kl_k1": self.gap.kl_k1,
            "greedy_agreement": self.gap.greedy_agreement,
            "task_accuracy": self.task.accuracy,
            "task_accuracy_at_export": recorded.accuracy if recorded else None,
            "gates": [asdict(gate) for gate in self.gates],
            "artifact_sha256": self.artifact_sha256,
            "engine": engine,
            "hardware": asdict(self.machine),
            "floor": self.manifest.floor,
            "tolerance": self.manifest.tolerance,
            "generate_tokens_per_s": self.task.generate_tokens_per_s,
            "seconds": self.seconds,
            "created": self.created,
        }
        plain: dict[str, Any] = _plain(fields)
        return plain


def worst(gates: Iterable[Gate]) -> Verdict:
    """The worst verdict of all gates, in the order of `VERDICTS`."""
    return max((gate.verdict for gate in gates), key=VERDICTS.index, default="undecided")


def judge(manifest: Manifest, gap: Gap, task: TaskResult) -> tuple[Gate, ...]:
    """Hold the measurements against the gates of the manifest's profile. An accuracy that was not measured has no gate."""
    spec = manifest.profile.gates
    gates = [_gap_gate(manifest, gap), _nonfinite_gate(gap)]
    few = _too_few(gap)
    kl = _upper("kl_k3", gap.kl_k3, spec.kl_k3_warn, spec.kl_k3_fail, f"k3 estimate of KL(engine || learner), nats per token{few}")
    agreement = _lower(
        "greedy_agreement", gap.greedy_agreement, spec.greedy_agreement_warn, spec.greedy_agreement_fail,
        f"share of probe tokens with the same most probable token{few}",
    )  # fmt: skip
    gates += [_undecided(gate) if few else gate for gate in (kl, agreement)]
    if task.accuracy is not None and manifest.task is not None:
        error = math.sqrt(max(task.accuracy * (1 - task.accuracy), 0.0) / task.num_judged)
        detail = f"{manifest.task.accuracy:.3f} at export, {task.accuracy:.3f} +- {error:.3f} here on {task.num_judged} problems"
        drop = manifest.task.accuracy - task.accuracy
        gates.append(_upper("accuracy_drop", drop, spec.accuracy_drop_warn, spec.accuracy_drop_fail, detail))
    return tuple(gates)


def _gap_gate(manifest: Manifest, gap: Gap) -> Gate:
    """Mean gap in units of the tolerance. It warns by the mean, but fails only where the whole interval lies beyond."""
    spec, tolerance = manifest.profile.gates, manifest.tolerance
    warn, fail = spec.gap_mean_warn, spec.gap_mean_fail
    if gap.mean is None or gap.interval is None or _too_few(gap):
        value = None if gap.mean is None else _ratio(gap.mean, tolerance)
        return Gate("gap_mean", value, warn, fail, "undecided", f"mean abs(dp) in units of the tolerance{_too_few(gap)}")
    value, low, high = (_ratio(x, tolerance) for x in (gap.mean, *gap.interval))
    verdict: Verdict = "fail" if low > fail else "warn" if value > warn else "pass"
    detail = f"mean abs(dp) / tolerance {tolerance:.4g}; 95 % interval [{low:.3g}, {high:.3g}] over {gap.num_sequences} sequences"
    if verdict == "warn" and value > fail:
        detail += "; the mean is beyond fail, its interval is not: more probes would decide"
    return Gate("gap_mean", value, warn, fail, verdict, detail)


def _nonfinite_gate(gap: Gap) -> Gate:
    total = gap.num_tokens + gap.num_nonfinite
    share = gap.num_nonfinite / total if total else 1.0
    detail = f"{gap.num_nonfinite} of {total} engine log-probs are not finite; they are left out of every other measure"
    return _upper("nonfinite_share", share, 0.0, NONFINITE_FAIL_SHARE, detail)


def _too_few(gap: Gap) -> str:
    """Why the probes decide nothing, or an empty string."""
    if gap.num_tokens < MIN_PROBE_TOKENS:
        return f"; only {gap.num_tokens} finite probe tokens, {MIN_PROBE_TOKENS} are needed to decide"
    return "; only one sequence, two are needed to decide" if gap.num_sequences < 2 else ""


def _upper(name: str, value: float | None, warn: float, fail: float, detail: str) -> Gate:
    if value is None or math.isnan(value):
        return Gate(name, None, warn, fail, "undecided", detail)
    detail += "; the value is infinite" if math.isinf(value) else ""
    return Gate(name, value, warn, fail, "fail" if value > fail else "warn" if value > warn else "pass", detail)


def _lower(name: str, value: float | None, warn: float, fail: float, detail: str) -> Gate:
    if value is None or math.isnan(value):
        return Gate(name, None, warn, fail, "undecided", detail)
    return Gate(name, value, warn, fail, "fail" if value < fail else "warn" if value < warn else "pass", detail)


def _undecided(gate: Gate) -> Gate:
    return Gate(gate.name, gate.value, gate.warn, gate.fail, "undecided", gate.detail)


def _ratio(value: float, tolerance: float) -> float:
    """`value` in units of `tolerance`; a tolerance of zero is met by zero only."""
    return value / tolerance if tolerance > 0 else 0.0 if value == 0 else math.inf


def _plain(value: Any) -> Any:
    """`value` with tuples as lists and non-finite floats as None, which every JSON reader understands."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
