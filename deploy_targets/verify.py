"""What the target serves, held against what learned: golden probes replayed, task accuracy measured, gates judged.

Three steps: `measure_gap` on the probes, `measure_task` on the task sample, `judge` by plain comparisons with the profile's gates.
Symbols: p = exp(log-prob) of a given token, d = learner_logp - engine_logp on it, both at the probes' temperature.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploy_targets.artifact import MANIFEST_FILE, TASK_SAMPLE_FILE, Manifest
from deploy_targets.errors import ArtifactError, EngineError, ProofError, UsageError
from deploy_targets.gates import Gap, Report, TaskResult, judge, worst
from deploy_targets.hardware import describe_machine, package_versions
from deploy_targets.probes import ProbeSet
from deploy_targets.protocols import Engine
from deploy_targets.types import Sampling, Server
from deploy_targets.weights_file import sha256_of

Reward = Callable[[list[str], list[str], dict[str, list[Any]]], Sequence[float | None]]
"""(prompts, completions, columns) -> one reward each; None where the reward does not apply. Solved means 1.0."""
Progress = Callable[[str, int, int], None]
"""(what is being done, done so far, total)."""

SOLVED = 1.0 - 1e-6
"""A problem counts as solved from this reward on."""
_SCORE_CHUNK = 32
_GENERATE_CHUNK = 256


def verify(
    artifact_dir: Path,
    engine: Engine,
    manifest: Manifest,
    probes: ProbeSet,
    *,
    reward: Reward | None = None,
    progress: Progress | None = None,
    server: Server | None = None,
) -> Report:
    """Measure `engine`, which serves the artifact in `artifact_dir`, and judge it by the gates of the artifact's profile.

    `manifest` comes from `check_artifact`, which must have passed before the engine was started. Without `reward`, or without a
    task sample in the artifact, task accuracy is not measured and has no gate. `server` is what `engine` asks, where it starts none:
    versions of the report are then the server's, beside this package's own.

    Raises `ProofError` when engine or probes hold another weight_version than the manifest, `EngineError` when the engine answers
    with the wrong number of tokens, `ArtifactError` for a damaged task sample, `UsageError` for a reward of the wrong length.
    """
    started = time.perf_counter()
    tell = progress or (lambda what, done, total: None)
    versions = {"manifest": manifest.weight_version, "engine": engine.weight_version, "probes": probes.weight_version}
    if len(set(versions.values())) > 1:
        raise ProofError(f"not the same weights: weight_version is {versions}. Start the engine with the manifest's, or export again")
    gap = measure_gap(engine, probes, tell)
    task = measure_task(artifact_dir, engine, manifest, probes, reward, tell)
    gates = judge(manifest, gap, task)
    return Report(
        verdict=worst(gates),
        gap=gap,
        task=task,
        gates=gates,
        artifact_sha256=sha256_of(artifact_dir / MANIFEST_FILE),
        engine_versions=package_versions() if server is None else {**package_versions(["hetero-rl"]), server.software: server.version},
        machine=describe_machine(),
        manifest=manifest,
        temperature=probes.temperature,
        seconds=time.perf_counter() - started,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        server=server,
    )


def measure_gap(engine: Engine, probes: ProbeSet, tell: Progress) -> Gap:
    """Replay the probes by `engine.score`; per-token arrays of the finite positions, and how many were not finite.

    A position without a finite engine log-prob leaves mask AND denominator of every measure; it is counted.
    """
    all_probes, scores = probes.probes, []
    for begin in range(0, len(all_probes), _SCORE_CHUNK):
        tell("replaying probes", begin, len(all_probes))
        scores += engine.score([probe.sequence for probe in all_probes[begin : begin + _SCORE_CHUNK]], probes.temperature)
    tell("replaying probes", len(all_probes), len(all_probes))
    if len(scores) != len(all_probes):
        raise EngineError(f"the engine scored {len(scores)} sequences of {len(all_probes)}")
    for index, (probe, score) in enumerate(zip(all_probes, scores, strict=True)):
        expected = len(probe.learner_logps)
        if len(score.logps) != expected or len(score.greedy_tokens) != expected:
            raise EngineError(f"probe {index}: the engine scored {len(score.logps)} tokens of {expected}")
        if score.temperature != probes.temperature or score.weight_version != probes.weight_version:
            scored_at = f"temperature {score.temperature}, weight_version {score.weight_version}"
            raise ProofError(f"probe {index}: scored at {scored_at}; asked for {probes.temperature}, {probes.weight_version}")
    lengths = [len(probe.learner_logps) for probe in all_probes]
    engine_logps = np.concatenate([score.logps for score in scores]).astype(np.float64)
    finite = np.isfinite(engine_logps)
    learner_greedy = np.concatenate([probe.learner_greedy for probe in all_probes])
    engine_greedy = np.concatenate([score.greedy_tokens for score in scores])
    return Gap(
        learner_logps=np.concatenate([probe.learner_logps for probe in all_probes]).astype(np.float64)[finite],
        engine_logps=engine_logps[finite],
        greedy_agrees=(learner_greedy == engine_greedy)[finite],
        sequence_index=np.repeat(np.arange(len(lengths)), lengths)[finite],
        position=np.concatenate([np.arange(length) for length in lengths])[finite],
        num_nonfinite=int((~finite).sum()),
    )


def measure_task(
    artifact_dir: Path, engine: Engine, manifest: Manifest, probes: ProbeSet, reward: Reward | None, tell: Progress
) -> TaskResult:
    """Generate greedily on the task sample (on the probes' prompts where there is none), time it, and let `reward` judge it.

    Accuracy is the share of rewards >= 1 - 1e-6 among those that are not None.
    """
    rows = read_task_sample(artifact_dir / TASK_SAMPLE_FILE)
    prompts = [row["prompt_tokens"] for row in rows] or [list(p.sequence.tokens[: p.sequence.prompt_len]) for p in probes.probes]
    stop = manifest.sampling.stop_token_ids
    engine.generate(prompts[:1], Sampling(max_tokens=1, temperature=0.0, stop_token_ids=stop))  # warm-up: not timed
    sampling = Sampling(max_tokens=manifest.sampling.max_tokens, temperature=0.0, stop_token_ids=stop)
    generations, seconds = [], 0.0
    for begin in range(0, len(prompts), _GENERATE_CHUNK):
        tell("generating", begin, len(prompts))
        started = time.perf_counter()
        generations += engine.generate(prompts[begin : begin + _GENERATE_CHUNK], sampling)
        seconds += time.perf_counter() - started
    tell("generating", len(prompts), len(prompts))
    if len(generations) != len(prompts):
        raise EngineError(f"the engine answered {len(generations)} prompts of {len(prompts)}")
    tokens_per_s = sum(len(generation.tokens) for generation in generations) / max(seconds, 1e-9)
    if reward is None or not rows:
        return TaskResult(accuracy=None, num_judged=0, generate_tokens_per_s=tokens_per_s)
    tell("judging", 0, len(rows))
    completions = decode(artifact_dir, [generation.tokens.tolist() for generation in generations])
    columns = {name: [row["columns"].get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row["columns"])}
    rewards = list(reward([row["prompt"] for row in rows], completions, columns))
    if len(rewards) != len(rows):
        raise UsageError(f"the reward gave {len(rewards)} values for {len(rows)} completions; it must give one each")
    judged = [value for value in rewards if value is not None]
    accuracy = sum(value >= SOLVED for value in judged) / len(judged) if judged else None
    return TaskResult(accuracy=accuracy, num_judged=len(judged), generate_tokens_per_s=tokens_per_s)


def read_task_sample(path: Path) -> list[dict[str, Any]]:
    """Rows `{"prompt_tokens": [...], "prompt": text, "columns": {...}}` of a JSON-lines file; empty where there is none."""
    if not path.is_file():
        return []
    rows = []
    try:
        # split at "\n" only: JSON strings may hold the other line ends that splitlines knows
        for number, line in enumerate(path.read_text("utf-8").removesuffix("\n").split("\n"), start=1):
            row = json.loads(line)
            if not _is_task_row(row):
                raise ArtifactError(f'{path}: line {number} must be {{"prompt_tokens": [ids], "prompt": text, "columns": {{...}}}}')
            rows.append(row)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is not JSON lines: {error}") from None
    return rows


def decode(artifact_dir: Path, completions: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token ids by the artifact's own tokenizer, special tokens skipped."""
    from tokenizers import Tokenizer

    path = artifact_dir / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; without it no reward can judge a completion. Export the artifact again")
    texts: list[str] = Tokenizer.from_file(str(path)).decode_batch([list(tokens) for tokens in completions], skip_special_tokens=True)
    return texts


def _is_task_row(row: object) -> bool:
    if not isinstance(row, Mapping) or set(row) != {"prompt_tokens", "prompt", "columns"}:
        return False
    tokens = row["prompt_tokens"]
    is_prompt = isinstance(tokens, list) and bool(tokens) and all(type(token) is int and token >= 0 for token in tokens)
    return is_prompt and isinstance(row["prompt"], str) and isinstance(row["columns"], Mapping)
