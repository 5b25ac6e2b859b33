"""What the target serves, held against what learned: golden probes replayed, task accuracy measured, gates judged.

The artifact itself is held against its fingerprint (`inspection.py`), and the engine is asked what has to agree (`engine_checks.py`). Then
`measure_gap` on the probes, `measure_task` on the task sample, `judge` by the profile's gates. The first two measure in
chunks and stop when the verdict is clear (`sequential.py` has the rule and its error rate). Symbols: p = exp(log-prob) of a given token,
d = learner_logp - engine_logp on it, both at the probes' temperature.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploy_targets.artifact import MANIFEST_FILE, TASK_SAMPLE_FILE, Manifest
from deploy_targets.engine_checks import check_engine
from deploy_targets.errors import ArtifactError, EngineError, ProofError, UsageError
from deploy_targets.gap import Gap, Slice
from deploy_targets.gates import Coverage, Report, TaskResult, judge, judge_checks, judge_gap, judge_inspection, judge_task, worst
from deploy_targets.hardware import describe_machine, package_versions
from deploy_targets.inspection import Inspection, inspect_artifact
from deploy_targets.probes import KINDS, ProbeSet
from deploy_targets.profile import GateSpec
from deploy_targets.protocols import Engine
from deploy_targets.sequential import LOOK_CONFIDENCE, accuracy_is_settled, chunks, fails_clearly, may_fail
from deploy_targets.serving_cost import ServingCost, first_token_s, peak_memory_bytes, weights_bytes
from deploy_targets.token_classes import TOKEN_CLASSES, load_tokenizer, token_classes
from deploy_targets.types import Sampling, Server, TokenScores
from deploy_targets.weights_file import sha256_of

Reward = Callable[[list[str], list[str], dict[str, list[Any]]], Sequence[float | None]]
"""(prompts, completions, columns) -> one reward each; None where the reward does not apply. Solved means 1.0."""
Progress = Callable[[str, int, int], None]
"""(what is being done, done so far, total)."""
Row = Mapping[str, Any]
"""One line of the task sample, see `read_task_sample`."""

_ROW = '{"prompt_tokens": [ids], "prompt": text, "columns": {...}} and may have "expected": number'
_SCORE_CHUNK = 1024
_GENERATE_CHUNK = 256
_MOST_CHECKED = 32
"""Tokens of a response that the engine is questioned about."""


def verify(
    artifact_dir: Path,
    engine: Engine,
    manifest: Manifest,
    probes: ProbeSet,
    *,
    reward: Reward | None = None,
    progress: Progress | None = None,
    server: Server | None = None,
    gates: GateSpec | None = None,
    full: bool = False,
    inspection: Inspection | None = None,
) -> Report:
    """Measure `engine`, which serves the artifact in `artifact_dir`, and judge it by `gates`, by default those of the artifact's profile.

    `manifest` comes from `check_artifact`, which must have passed before the engine was started, or from `foreign_manifest`. Without
    `reward`, or without a task sample in the artifact, task accuracy is not measured and has no gate. `full` measures everything,
    however clear the verdict is. `inspection` is made here when not given. `server` is what `engine` asks, where it starts none: versions
    of the report are then the server's, beside this package's own.

    Raises `ProofError` when engine or probes hold another weight_version than the manifest, `EngineError` when the engine answers
    with the wrong number of tokens, `ArtifactError` for a damaged task sample, `UsageError` for a reward of the wrong length.
    """
    started = time.perf_counter()
    tell = progress or (lambda what, done, total: None)
    versions = {"manifest": manifest.weight_version, "engine": engine.weight_version, "probes": probes.weight_version}
    if len(set(versions.values())) > 1:
        raise ProofError(f"not the same weights: weight_version is {versions}. Start the engine with the manifest's, or export again")
    inspection = inspection or inspect_artifact(artifact_dir, manifest, probes)
    policy = probes.of_kind("policy")
    spec, rows = gates or manifest.profile.gates, read_task_sample(artifact_dir / TASK_SAMPLE_FILE)

    def gap_is_clear(gap: Gap) -> bool:
        looked_at = may_fail(judge_gap(spec, manifest.tolerance, gap, None))
        return looked_at and fails_clearly(judge_gap(spec, manifest.tolerance, gap, LOOK_CONFIDENCE))

    def task_is_clear(task: TaskResult) -> bool:
        return accuracy_is_settled(judge_task(spec, manifest, task, LOOK_CONFIDENCE))

    tell("asking the engine", 0, 1)
    checks = check_engine(engine, policy, min(manifest.sampling.max_tokens, _MOST_CHECKED), manifest.sampling.stop_token_ids)
    gap = measure_gap(engine, policy, tell, full=full, is_clear=gap_is_clear)
    others: dict[str, Gap] = {}
    task, speed, stopped = TaskResult(), Speed(), []
    if len(gap.scored) < len(policy.probes):
        stopped.append("the probes fail clearly")
    else:
        kinds = [kind for kind in KINDS if kind != "policy" and probes.num_scored(kind)]
        others = {kind: measure_gap(engine, probes.of_kind(kind), tell) for kind in kinds}
    if not full and worst(judge_gap(spec, manifest.tolerance, gap, others=others)) == "fail":
        stopped.append("no task can save probes that fail")
    else:
        task, speed = measure_task(artifact_dir, engine, manifest, policy, rows, reward, tell, full=full, is_clear=task_is_clear)
        if 0 < speed.num_judged < len(rows):
            stopped.append("the accuracy is clear")
    judged = (*judge(manifest, gap, task, others=others, gates=spec), *judge_inspection(inspection), *judge_checks(checks))
    num_replayed = sum(len(measured.scored) for measured in (gap, *others.values()))
    coverage = Coverage(num_replayed, len(probes.probes), speed.num_judged, len(rows), "; ".join(stopped))
    return Report(
        verdict=worst(judged),
        gap=gap,
        other_kinds=others,
        learner_dtype=probes.learner_dtype,
        task=task,
        gates=judged,
        artifact_sha256=sha256_of(artifact_dir / MANIFEST_FILE) if manifest.is_sealed else manifest.files_sha256(),
        engine_versions=package_versions() if server is None else {**package_versions(["hetero-rl"]), server.software: server.version},
        machine=describe_machine(),
        manifest=manifest,
        temperature=probes.temperature,
        seconds=time.perf_counter() - started,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        slices=gap_slices(artifact_dir, gap),
        cost=ServingCost(speed.tokens_per_s, speed.first_token_s, peak_memory_bytes() if server is None else None, weights_bytes(manifest)),
        coverage=coverage,
        gates_changed=_changed(manifest.profile.gates, spec),
        server=server,
        inspection=inspection,
        checks=checks,
    )


def measure_gap(
    engine: Engine, probes: ProbeSet, tell: Progress, *, full: bool = True, is_clear: Callable[[Gap], bool] = lambda gap: False
) -> Gap:
    """Replay the probes by `engine.score`: all of them, or, not `full`, until `is_clear` says so at one of the looks.

    A position without a finite engine log-prob leaves mask AND denominator of every measure; it is counted.
    """
    scores: dict[int, TokenScores] = {}
    for chunk in chunks(len(probes.probes), full=full):
        scores.update(zip(chunk, replay(engine, probes, chunk, tell, len(scores)), strict=True))
        measured = sorted(scores)
        gap = Gap.of([probes.probes[i] for i in measured], [scores[i] for i in measured])
        if len(scores) < len(probes.probes) and is_clear(gap):
            break
    return gap


def replay(engine: Engine, probes: ProbeSet, indices: Sequence[int], tell: Progress, num_done: int = 0) -> list[TokenScores]:
    """The engine's scores of the probes at `indices`, in their order; `num_done` were replayed before.

    Raises `EngineError` for a wrong number of answers or tokens, `ProofError` for scores at another temperature or of other weights.
    """
    scores: list[TokenScores] = []
    for begin in range(0, len(indices), _SCORE_CHUNK):
        tell("replaying probes", num_done + begin, len(probes.probes))
        scores += engine.score([probes.probes[i].sequence for i in indices[begin : begin + _SCORE_CHUNK]], probes.temperature)
    tell("replaying probes", num_done + len(indices), len(probes.probes))
    if len(scores) != len(indices):
        raise EngineError(f"the engine scored {len(scores)} sequences of {len(indices)}")
    for index, score in zip(indices, scores, strict=True):
        expected = len(probes.probes[index].learner_logps)
        if len(score.logps) != expected or len(score.greedy_tokens) != expected:
            raise EngineError(f"probe {index}: the engine scored {len(score.logps)} tokens of {expected}")
        if score.temperature != probes.temperature or score.weight_version != probes.weight_version:
            scored_at = f"temperature {score.temperature}, weight_version {score.weight_version}"
            raise ProofError(f"probe {index}: scored at {scored_at}; asked for {probes.temperature}, {probes.weight_version}")
    return scores


def gap_slices(artifact_dir: Path, gap: Gap) -> dict[str, tuple[Slice, ...]]:
    """Where the gap lies: by position and the learner's probability; by its entropy and by token class, where these are known."""
    slices = {"position": gap.by_position(), "learner_probability": gap.by_learner_probability()}
    if entropy := gap.by_entropy():
        slices["entropy"] = entropy
    classes = token_classes(artifact_dir, gap.token_ids)
    return slices if classes is None else {**slices, "token_class": gap.sliced(TOKEN_CLASSES, classes)}


@dataclass(frozen=True, slots=True)
class Speed:
    """Greedy generation, of which `num_judged` responses went to the reward, and the time to the first token of a single one."""

    num_judged: int = 0
    tokens_per_s: float | None = None
    first_token_s: float | None = None


def measure_task(
    artifact_dir: Path,
    engine: Engine,
    manifest: Manifest,
    probes: ProbeSet,
    rows: Sequence[Row],
    reward: Reward | None,
    tell: Progress,
    *,
    full: bool = True,
    is_clear: Callable[[TaskResult], bool] = lambda task: False,
) -> tuple[TaskResult, Speed]:
    """Generate greedily on the task sample `rows`, time it, and let `reward` judge it, until `is_clear` says so at one of the looks.

    Without a reward or a sample only speed is measured, on no more than one batch of the sample's or the probes' prompts.
    """
    prompts = [row["prompt_tokens"] for row in rows] or [list(p.sequence.tokens[: p.sequence.prompt_len]) for p in probes.probes]
    first = first_token_s(engine, prompts, manifest.sampling.stop_token_ids)
    if reward is None or not rows:
        some = list(range(len(prompts) if full else min(len(prompts), _GENERATE_CHUNK)))
        responses, seconds = _respond(engine, manifest, prompts, some, tell)
        return TaskResult(), Speed(0, sum(map(len, responses)) / seconds, first)
    rewards: dict[int, float | None] = {}
    num_tokens, seconds = 0, 0.0
    for chunk in chunks(len(rows), full=full):
        responses, chunk_seconds = _respond(engine, manifest, prompts, chunk, tell, len(rewards))
        num_tokens, seconds = num_tokens + sum(map(len, responses)), seconds + chunk_seconds
        tell("judging", len(rewards), len(rows))
        rewards.update(zip(chunk, _rewards(artifact_dir, [rows[i] for i in chunk], responses, reward), strict=True))
        task = _task_result(rows, rewards)
        if len(rewards) < len(rows) and is_clear(task):
            break
    return task, Speed(len(rewards), num_tokens / seconds, first)


def _respond(
    engine: Engine, manifest: Manifest, prompts: Sequence[Sequence[int]], indices: Sequence[int], tell: Progress, num_done: int = 0
) -> tuple[list[list[int]], float]:
    """Greedy responses to the prompts at `indices`, and the seconds they took."""
    sampling = Sampling(max_tokens=manifest.sampling.max_tokens, temperature=0.0, stop_token_ids=manifest.sampling.stop_token_ids)
    responses: list[list[int]] = []
    seconds = 0.0
    for begin in range(0, len(indices), _GENERATE_CHUNK):
        tell("generating", num_done + begin, len(prompts))
        started = time.perf_counter()
        generations = engine.generate([prompts[i] for i in indices[begin : begin + _GENERATE_CHUNK]], sampling)
        seconds += time.perf_counter() - started
        responses += [generation.tokens.tolist() for generation in generations]
    tell("generating", num_done + len(indices), len(prompts))
    if len(responses) != len(indices):
        raise EngineError(f"the engine answered {len(responses)} prompts of {len(indices)}")
    return responses, max(seconds, 1e-9)


def _rewards(artifact_dir: Path, rows: Sequence[Row], responses: Sequence[Sequence[int]], reward: Reward) -> list[float | None]:
    columns = {name: [row["columns"].get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row["columns"])}
    rewards = list(reward([row["prompt"] for row in rows], decode(artifact_dir, responses), columns))
    if len(rewards) != len(rows):
        raise UsageError(f"the reward gave {len(rewards)} values for {len(rows)} completions; it must give one each")
    return rewards


def _task_result(rows: Sequence[Row], rewards: Mapping[int, float | None]) -> TaskResult:
    """Rewards that are None, where the reward does not apply, are left out. Every row says what the export got, or none counts."""
    judged = sorted(index for index, value in rewards.items() if value is not None)
    has_expected = all("expected" in row for row in rows)
    expected = [math.nan if rows[i].get("expected") is None else float(rows[i]["expected"]) for i in judged]
    return TaskResult(np.array([rewards[i] for i in judged], float), np.array(expected, float) if has_expected else None)


def _changed(old: GateSpec, new: GateSpec) -> dict[str, tuple[float, float]]:
    bounds = {name: (getattr(old, name), getattr(new, name)) for name in GateSpec.model_fields}
    return {name: pair for name, pair in bounds.items() if pair[0] != pair[1]}


def read_task_sample(path: Path) -> list[dict[str, Any]]:
    """Rows `{"prompt_tokens": [...], "prompt": text, "columns": {...}, "expected": reward}` of a JSON-lines file; none where it is absent.

    `expected` is the reward of the exported engine's greedy response, null where none applied; artifacts of older versions have none.
    """
    if not path.is_file():
        return []
    rows = []
    try:
        # split at "\n" only: JSON strings may hold the other line ends that splitlines knows
        for number, line in enumerate(path.read_text("utf-8").removesuffix("\n").split("\n"), start=1):
            row = json.loads(line)
            if not _is_task_row(row):
                raise ArtifactError(f"{path}: line {number} must be {_ROW}")
            rows.append(row)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is not JSON lines: {error}") from None
    return rows


def decode(artifact_dir: Path, completions: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token ids by the artifact's own tokenizer, special tokens skipped."""
    tokenizer = load_tokenizer(artifact_dir)
    if tokenizer is None:
        raise ArtifactError(
            f"{artifact_dir / 'tokenizer.json'} is missing; without it no reward can judge a completion. Export the artifact again"
        )
    texts: list[str] = tokenizer.decode_batch([list(tokens) for tokens in completions], skip_special_tokens=True)
    return texts


def _is_task_row(row: object) -> bool:
    if not isinstance(row, Mapping) or set(row) - {"expected"} != {"prompt_tokens", "prompt", "columns"}:
        return False
    if not isinstance(row.get("expected"), int | float | None):
        return False
    tokens = row["prompt_tokens"]
    is_prompt = isinstance(tokens, list) and bool(tokens) and all(type(token) is int and token >= 0 for token in tokens)
    return is_prompt and isinstance(row["prompt"], str) and isinstance(row["columns"], Mapping)
