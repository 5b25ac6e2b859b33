"""From the folder the engine serves to an artifact that proves what it is."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy_targets.artifact import (
    PROBES_FILE,
    TASK_SAMPLE_FILE,
    SamplingRecord,
    TaskRecord,
    write_atomically,
    write_manifest,
)
from deploy_targets.probes import Probe, ProbeSet, write_probes
from deploy_targets.profile import TargetProfile
from deploy_targets.types import Sampling
from hetero_rl.checkpoint import LoopState
from hetero_rl.config import RunConfig
from hetero_rl.parts import Parts
from hetero_rl.rollout import probability_gap, response_rewards, sample, solved_share
from hetero_rl.tasks.base import Problem, Task
from hetero_rl.tasks.rewards import reward_text

NUM_PROBE_PROMPTS = 64
PROBE_SEED = 2_000_000_000


def export_artifact(config: RunConfig, profile: TargetProfile, parts: Parts, state: LoopState, folder: Path) -> float:
    """Write the artifact of the weights the engine serves now: the very bytes, probes, task sample, manifest.

    The folder appears under its name when it is complete; one that was there before is replaced.
    Returns the deployed accuracy on the task sample, which the manifest records.
    """
    task, publisher, sampling = parts.task, parts.publisher, parts.sampling
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(publisher.folder, temporary)

    problems = task.heldout_problems(config.evaluation.num_final_problems)
    probes, gap = record_probes(parts, problems, config.export.probe_tokens, state.weight_version)
    write_probes(temporary / PROBES_FILE, probes)

    greedy = Sampling(sampling.max_tokens, 0.0, stop_token_ids=sampling.stop_token_ids)
    responses = sample(publisher.engine, task, problems, 1, greedy)
    rewards = response_rewards(task, problems, [response.tokens for response in responses])
    solved = solved_share(rewards)
    write_atomically(temporary / TASK_SAMPLE_FILE, task_sample(task, problems, rewards))
    write_manifest(
        temporary,
        profile=profile,
        weight_version=state.weight_version,
        source_model=Path(config.model.path).name,
        floor=state.floor.mean,
        tolerance=state.tolerance,
        sampling=SamplingRecord(max_tokens=sampling.max_tokens, stop_token_ids=sampling.stop_token_ids),
        final_gap=gap,
        # No reward judged the held-out problems: there is no accuracy to record.
        task=TaskRecord(accuracy=solved, num_problems=len(problems), reward=reward_text(config.task.reward_terms))
        if math.isfinite(solved)
        else None,
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return solved


def record_probes(parts: Parts, problems: list[Problem], num_tokens: int, weight_version: int) -> tuple[ProbeSet, float]:
    """Golden probes: what the deployed policy says to held-out prompts, with the learner's log-prob of every token.

    Returns the probes and the mean abs(p_learner - p_engine) on them, as this engine measures it.
    """
    sampling = parts.sampling
    probes: list[Probe] = []
    gaps: list[np.ndarray] = []
    count, batch = 0, 0
    while count < num_tokens:
        start = batch * NUM_PROBE_PROMPTS % len(problems)
        seeded = Sampling(sampling.max_tokens, sampling.temperature, PROBE_SEED + batch, sampling.stop_token_ids)
        generations = sample(parts.publisher.engine, parts.task, problems[start : start + NUM_PROBE_PROMPTS], 1, seeded)
        sequences = [g.sequence for g in generations]
        scores = parts.learner.score(sequences, routes=[g.routes for g in generations])
        for sequence, generation, score in zip(sequences, generations, scores, strict=True):
            probes.append(Probe(sequence, score.logps.astype(np.float32), score.greedy_tokens.astype(np.int32)))
            gaps.append(probability_gap(score.logps, generation.logps))
            count += len(generation.tokens)
        batch += 1
    return ProbeSet(tuple(probes), sampling.temperature, weight_version), float(np.nanmean(np.concatenate(gaps)))


def task_sample(task: Task, problems: list[Problem], rewards: NDArray[np.float32]) -> bytes:
    """`task_sample.jsonl`: prompt tokens, prompt text, the columns a reward needs, and the reward the exported engine got (null for NaN).

    No code, and no tokenizer call on the target.
    """
    lines = [
        json.dumps({
            "prompt_tokens": list(task.encode_prompt(problem)),
            "prompt": problem.prompt if isinstance(problem.prompt, str) else json.dumps(problem.prompt),
            "columns": dict(problem.columns),
            "expected": float(reward) if math.isfinite(reward) else None,
        }, default=str)
        for problem, reward in zip(problems, rewards, strict=True)
    ]  # fmt: skip
    return ("\n".join(lines) + "\n").encode()
