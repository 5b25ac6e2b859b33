"""From the folder the engine serves to an artifact that proves what it is."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
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
from deploy_targets.fingerprint import write_fingerprint
from deploy_targets.memory import max_tokens
from deploy_targets.probes import ProbeSet, write_probes
from deploy_targets.profile import TargetProfile
from deploy_targets.quantizers.model_files import read_config
from deploy_targets.types import Generation, Sampling
from deploy_targets.vocabulary import TOKENIZER_FILE, read_vocabulary
from hetero_rl.algorithm.discrepancy import token_gap
from hetero_rl.checkpoint import LoopState
from hetero_rl.config import RunConfig
from hetero_rl.model import resolve_model
from hetero_rl.parts import Parts
from hetero_rl.probing import enough_policy, make_probes
from hetero_rl.rollout import response_rewards, sample, solved_share
from hetero_rl.tasks.base import Problem, Task
from hetero_rl.tasks.rewards import reward_text

NUM_PROBE_PROMPTS = 64
PROBE_SEED, SEEDS_APART = 2_000_000_000, 1_000_003
"""Beyond the seeds of a run's steps; batches of probes are as far apart as no two runs are likely to be."""


def export_artifact(config: RunConfig, profile: TargetProfile, parts: Parts, state: LoopState, folder: Path) -> float:
    """Write the artifact of the weights the engine serves now: the very bytes, probes, task sample, fingerprint, manifest.

    The folder appears under its name when it is complete; one that was there before is replaced.
    Returns the deployed accuracy on the task sample, which the manifest records.
    """
    task, publisher, sampling = parts.task, parts.publisher, parts.sampling
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(publisher.folder, temporary)

    problems = task.heldout_problems(config.evaluation.num_final_problems)
    greedy = Sampling(sampling.max_tokens, 0.0, stop_token_ids=sampling.stop_token_ids)
    responses = sample(publisher.engine, task, problems, 1, greedy)
    source_model = Path(config.model.path).name
    seed = PROBE_SEED + config.loop.seed
    probes, gap = record_probes(parts, profile, problems, responses, state.weight_version, source_model, seed)
    write_probes(temporary / PROBES_FILE, probes)

    rewards = response_rewards(task, problems, [response.tokens for response in responses])
    solved = solved_share(rewards)
    write_atomically(temporary / TASK_SAMPLE_FILE, task_sample(task, problems, rewards))
    recorded = SamplingRecord(max_tokens=sampling.max_tokens, stop_token_ids=sampling.stop_token_ids)
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.learner.named_tensors()}
    learned = ((name, tensor.detach().float().cpu().numpy()) for name, tensor in parts.learner.named_tensors())
    learner_config = read_config(resolve_model(config.model.path))
    write_fingerprint(temporary, profile, recorded, sampling.temperature, learner_config, shapes, learned)
    write_manifest(
        temporary,
        profile=profile,
        weight_version=state.weight_version,
        source_model=source_model,
        floor=state.served_floor,
        tolerance=state.served_tolerance,
        sampling=recorded,
        final_gap=gap,
        # No reward judged the held-out problems: there is no accuracy to record.
        task=TaskRecord(accuracy=solved, num_problems=len(problems), reward=reward_text(config.task.reward_terms))
        if math.isfinite(solved)
        else None,
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return solved


def record_probes(
    parts: Parts,
    profile: TargetProfile,
    problems: Sequence[Problem],
    greedy: Sequence[Generation],
    weight_version: int,
    source_model: str,
    seed: int,
) -> tuple[ProbeSet, float]:
    """Golden probes of every kind: what the deployed policy says to held-out prompts, and what the learner says about every token.

    `greedy` are its most probable responses to `problems`. Returns the probes and the mean abs(p_learner - p_engine) on the policy's
    samples, as this engine measures it.
    """
    sampling, learner, folder = parts.sampling, parts.learner, parts.publisher.folder
    config = learner.policy.lm.config.get_text_config()
    sampled: list[Generation] = []
    batch = 0
    while (enough := enough_policy(profile.probes, [generation.sequence for generation in sampled])) is None:
        start = batch * NUM_PROBE_PROMPTS % len(problems)
        seeded = Sampling(sampling.max_tokens, sampling.temperature, seed + SEEDS_APART * batch, sampling.stop_token_ids)
        sampled += sample(parts.publisher.engine, parts.task, problems[start : start + NUM_PROBE_PROMPTS], 1, seeded)
        batch += 1
    sampled = sampled[:enough]
    vocabulary = read_vocabulary(folder / TOKENIZER_FILE)
    probes = make_probes(
        profile.probes,
        learner,
        [generation.sequence for generation in sampled],
        [generation.sequence for generation in greedy],
        max_len=max_tokens(profile, {"max_position_embeddings": getattr(config, "max_position_embeddings", None)}),
        ordinary_ids=vocabulary.ordinary_ids,
        seed=seed,
        routes={generation.sequence: generation.routes for generation in (*sampled, *greedy) if generation.routes is not None},
    )
    probe_set = ProbeSet(
        probes,
        sampling.temperature,
        weight_version,
        learner_dtype=learner.compute_dtype,
        source_model=source_model,
        vocab_size=int(config.vocab_size),
        vocabulary_sha256=vocabulary.sha256,
    )
    gaps = [token_gap(probe.learner_logps, said.logps) for probe, said in zip(probe_set.of_kind("policy").probes, sampled, strict=True)]
    return probe_set, float(np.nanmean(np.concatenate(gaps)))


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
