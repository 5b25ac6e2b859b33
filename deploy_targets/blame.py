"""Where a gap comes from: what was looked at, how much of the gap each suspect explains, and the one that is named.

Looked at in this order, from what is certain to what is likely; the first that holds is named:

    setting       a value of the artifact is not what it was at export
    tensor        a tensor is not what was exported; the first layer that departs
    activation    a module's output departs from the learner's (`--bisect`); the first one
    option        the gap of some probes falls by at least half when one option of the engine is changed
    check         the engine contradicts itself (`engine_checks.py`)
    part          at least half of the gap lies on few of the tokens: a token class, a stretch of positions, a kind of probe
    layer         one tensor lies much further from the learner's weights than others of its kind; else the scheme as a whole

`explains` of an option: the share of the mean abs(dp) beyond the run's floor that goes away with it. Of a part: (g - t) / (1 - t), g its
share of the gap and t its share of the tokens. Settings, tensors and checks have none: they should not be there at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from deploy_targets.engines.options import OPTIONS
from deploy_targets.errors import DeployTargetsError
from deploy_targets.gap import Gap
from deploy_targets.gates import Report
from deploy_targets.inspection import Layer, kind_of, some
from deploy_targets.probes import Probe, ProbeSet
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Engine

SuspectKind = Literal["setting", "tensor", "check", "activation", "option", "part", "layer"]
OpenEngine = Callable[[TargetProfile], Engine]

NUM_REPLAYED = 32
_HALF = 0.5
_FEW_TOKENS = 0.5
"""A part that has more of the tokens than this share of its share of the gap names nothing."""
_KIND_FACTOR = 3.0
"""A kind of probes whose mean gap is this many times that of the policy's samples is named."""
_LAYER_FACTOR = 2.0
_GAP_GATES = ("gap_mean", "gap_kinds", "nonfinite_share", "kl_k3", "greedy_agreement")
_OTHER_VALUES: dict[str, dict[str, object]] = {
    "vllm": {"kv_cache_dtype": "auto", "enable_prefix_caching": False, "enforce_eager": True, "cpu_int4_w4a8": False},
    "llamacpp": {"kv_cache_dtype": "f32", "flash_attention": False, "max_batch_size": 1, "num_gpu_layers": 0},
    "transformers": {"dtype": "float32", "score_batch_size": 1},
    "onnxruntime": {"execution_provider": "CPUExecutionProvider", "threads_per_batch": 2},
    "fake": {"nan_logps": 0.0},
}
"""Engine -> option -> the plainest value it has."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """One thing that was looked at. `holds`: whether it is at fault; `explains`: share of the gap, None where that is no question."""

    kind: SuspectKind
    name: str
    holds: bool
    explains: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class Blame:
    """`cause` is the suspect that is named; None where nothing stands out."""

    cause: Suspect | None
    looked_at: tuple[Suspect, ...]

    @property
    def sentence(self) -> str:
        """For people, in one sentence."""
        if self.cause is None:
            return "no cause found: no setting, tensor, option or part of the tokens stands out"
        share = "" if self.cause.explains is None else f" (explains {self.cause.explains:.0%} of the gap)"
        return f"{self.cause.name}{share}: {self.cause.detail}"

    def to_json(self) -> dict[str, Any]:
        """`kind`, `name`, `explains`, `detail` of the cause, each null without one, and `sentence`."""
        cause = self.cause
        named = dict.fromkeys(("kind", "name", "explains", "detail")) if cause is None else _suspect_json(cause)
        return {**named, "sentence": self.sentence}

    def looked_at_json(self) -> list[dict[str, Any]]:
        """`kind`, `name`, `holds`, `explains`, `detail` of everything that was looked at, in that order."""
        return [{**_suspect_json(suspect), "holds": suspect.holds} for suspect in self.looked_at]


def _suspect_json(suspect: Suspect) -> dict[str, Any]:
    return {"kind": suspect.kind, "name": suspect.name, "explains": suspect.explains, "detail": suspect.detail}


def with_blame(report: Report, probes: ProbeSet, open_engine: OpenEngine | None) -> Report:
    """`report` with its blame; as it is where it passes.

    `open_engine` starts the engine anew by a changed profile, to replay probes; the one that was measured must be closed. Without it, as
    for a server that runs already, options are not varied.
    """
    if report.verdict == "pass":
        return report
    suspects = [*_settings(report), *_tensors(report), *_whole_files(report), *_activations(report)]
    if open_engine is not None and not any(s.holds for s in suspects if s.kind in ("setting", "tensor")) and _gap_is_off(report):
        suspects += _options(report, probes, open_engine)
    suspects += [*_checks(report), *_parts(report), *_kinds(report), *_layers(report)]
    if not any(suspect.holds for suspect in suspects):
        suspects += _scheme(report)
    return replace(report, blame=Blame(next((suspect for suspect in suspects if suspect.holds), None), tuple(suspects)))


def _gap_is_off(report: Report) -> bool:
    return any(gate.verdict != "pass" for gate in report.gates if gate.name in _GAP_GATES)


def _settings(report: Report) -> Iterator[Suspect]:
    found = report.inspection
    for difference in found.settings:
        if not difference.is_whole_file:
            yield Suspect("setting", difference.title, True, None, difference.detail)
    if found.num_settings and not found.settings:
        yield Suspect("setting", "settings", False, None, f"all {found.num_settings} are as exported")


def _whole_files(report: Report) -> Iterator[Suspect]:
    """A graph or header that differs: named where no value in it and no tensor is."""
    for difference in report.inspection.settings:
        if difference.is_whole_file:
            yield Suspect("setting", difference.title, True, None, difference.detail)


def _tensors(report: Report) -> Iterator[Suspect]:
    layers, changed = report.inspection.layers, report.inspection.changed_layers
    if not layers:
        return
    if not changed:
        sealed = report.manifest.is_sealed
        said = "as exported" if sealed else "finite, and none is lost; only how far they lie from the model's is known"
        yield Suspect("tensor", "weights", False, None, f"all {len(layers)} tensors are {said}")
    elif report.manifest.is_sealed and len(changed) > len(layers) / 2:
        detail = f"{len(changed)} of {len(layers)} tensors differ, first {changed[0].name}, which {changed[0].problem}"
        yield Suspect("tensor", "weights of another version", True, None, detail)
    else:
        first = changed[0]
        others = f"; also {some([layer.name for layer in changed[1:]])}" if len(changed) > 1 else ""
        yield Suspect("tensor", first.name, True, None, f"{first.problem}{others}")


def _checks(report: Report) -> Iterator[Suspect]:
    for check in report.checks:
        failed = check.passed is False
        yield Suspect("check", check.cause if failed else check.name, failed, None, check.detail)


def _activations(report: Report) -> Iterator[Suspect]:
    if report.activations is None:
        return
    first, modules = report.activations.first, report.activations.modules
    if first is None:
        yield Suspect("activation", "activations", False, None, f"none of {len(modules)} modules departs from the learner's")
    else:
        detail = f"the first module whose output departs: by {first.local_error:.1%} of its norm on the learner's own inputs"
        yield Suspect("activation", first.name, True, None, detail)


def _options(report: Report, probes: ProbeSet, open_engine: OpenEngine) -> Iterator[Suspect]:
    """Replays of some probes, with one option changed at a time."""
    profile = report.manifest.profile
    worst = max(({"policy": report.gap} | dict(report.other_kinds)).items(), key=lambda item: _badness(item[1]))[0]
    chosen = [probe for probe in probes.probes if probe.kind == worst]
    chosen = chosen[:: max(1, len(chosen) // NUM_REPLAYED)][:NUM_REPLAYED]
    try:
        base, alone = _replayed(open_engine, profile, chosen, probes.temperature, also_alone=True)
    except DeployTargetsError as error:
        yield Suspect("option", "engine.options", False, None, f"the engine did not start again: {error}")
        return
    floor = min(report.manifest.floor or 0.0, base)

    def suspect(name: str, gap: float) -> Suspect:
        explains = min(1.0, (base - gap) / (base - floor)) if base > floor else 0.0
        return Suspect("option", name, explains >= _HALF, explains, f"mean abs(dp) {base:.4f} -> {gap:.4f} on {len(chosen)} {worst} probes")

    yield suspect("batches: one sequence at a time", alone)
    for name, value in _variations(profile):
        label = f"engine.options.{name} (here {_option(profile, name)!r}, tried {value!r})"
        options = {**profile.engine.options, name: value}
        changed = profile.model_copy(update={"engine": profile.engine.model_copy(update={"options": options})})
        try:
            yield suspect(label, _replayed(open_engine, changed, chosen, probes.temperature)[0])
        except DeployTargetsError as error:
            yield Suspect("option", label, False, None, f"could not be tried: {str(error).splitlines()[0]}")


def _variations(profile: TargetProfile) -> list[tuple[str, object]]:
    values = _OTHER_VALUES.get(profile.engine.name, {})
    return [(name, value) for name, value in values.items() if _option(profile, name) != value]


def _option(profile: TargetProfile, name: str) -> object:
    return profile.engine.options.get(name, OPTIONS[profile.engine.name].model_fields[name].default)


def _replayed(
    open_engine: OpenEngine, profile: TargetProfile, chosen: Sequence[Probe], temperature: float, *, also_alone: bool = False
) -> tuple[float, float]:
    """Mean abs(dp) of the probes in one call, and one by one (`also_alone`, else the same); a log-prob that is not finite counts as 1."""
    sequences = [probe.sequence for probe in chosen]
    with closing(open_engine(profile)) as engine:
        together = [score.logps for score in engine.score(sequences, temperature)]
        alone = [engine.score([sequence], temperature)[0].logps for sequence in sequences] if also_alone else together
    learner = np.exp(np.concatenate([probe.learner_logps for probe in chosen]).astype(np.float64))

    def gap(logps: Sequence[Any]) -> float:
        p = np.exp(np.concatenate(logps).astype(np.float64))
        return float(np.where(np.isfinite(p), np.abs(learner - p), 1.0).mean())

    return gap(together), gap(alone)


def _badness(gap: Gap) -> float:
    return (gap.measure("abs_dp_mean", None).value or 0.0) + gap.num_nonfinite / max(1, int(gap.scored.sum()))


def _parts(report: Report) -> Iterator[Suspect]:
    """Token classes and positions."""
    for name in ("token_class", "position"):
        parts = report.slices.get(name, ())
        num_tokens = sum(part.num_tokens for part in parts)
        total = sum(part.num_tokens * (part.abs_dp.value or 0.0) for part in parts)
        if len(parts) < 2 or total <= 0:
            continue
        worst = max(parts, key=lambda part: part.num_tokens * (part.abs_dp.value or 0.0))
        of_gap, of_tokens = worst.num_tokens * (worst.abs_dp.value or 0.0) / total, worst.num_tokens / num_tokens
        explains = (of_gap - of_tokens) / (1 - of_tokens)
        holds = of_gap >= _HALF and of_tokens <= _FEW_TOKENS * of_gap
        detail = f"{of_tokens:.0%} of the tokens have {of_gap:.0%} of the gap"
        yield Suspect("part", f"{name.replace('_', ' ')}: {worst.label}", holds, explains, detail)


def _kinds(report: Report) -> Iterator[Suspect]:
    policy = report.gap.measure("abs_dp_mean", None).value or 0.0
    for kind, gap in report.other_kinds.items():
        mean = gap.measure("abs_dp_mean", None).value or 0.0
        holds = mean > _KIND_FACTOR * max(policy, report.manifest.tolerance)
        yield Suspect("part", f"{kind} probes", holds, None, f"mean abs(dp) {mean:.4f}, {policy:.4f} on policy samples")


def _layers(report: Report) -> Iterator[Suspect]:
    """The tensor that lies furthest from the learner's, for its kind (`self_attn.q_proj.weight`)."""
    kinds: dict[str, list[float]] = defaultdict(list)
    compared = [(layer, layer.error) for layer in report.inspection.layers if layer.error is not None]
    for layer, error in compared:
        kinds[_kind_of(layer)].append(error)
    if not compared:
        return
    ratios = [(error / max(float(np.median(kinds[_kind_of(layer)])), 1e-9), layer, error) for layer, error in compared if error > 0]
    ratio, layer, error = max(ratios, key=lambda item: item[0], default=(0.0, compared[0][0], 0.0))
    detail = f"its weights lie {error:.1%} from the learner's, {ratio:.1f} times the median of its kind"
    yield Suspect("layer", layer.name, ratio >= _LAYER_FACTOR and len(kinds[_kind_of(layer)]) > 2, None, detail)


def _scheme(report: Report) -> Iterator[Suspect]:
    """What is left to blame where nothing else stands out."""
    scheme, errors = report.manifest.scheme, [layer.error for layer in report.inspection.layers if layer.error]
    if errors:
        detail = f"{len(errors)} tensors lie {float(np.mean(errors)):.1%} from the learner's in the mean, and nothing else stands out"
        name = f"the scheme {scheme} itself" if report.manifest.is_sealed else "the quantization itself"
        yield Suspect("layer", name, _gap_is_off(report), None, detail)


def _kind_of(layer: Layer) -> str:
    return kind_of(layer.name)
