"""A real artifact on the fake engine: tiny model, golden probes that the engine itself answered, task sample, manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deploy_targets.artifact import PROBES_FILE, TASK_SAMPLE_FILE, Manifest, SamplingRecord, TaskRecord, write_manifest
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.probes import Probe, ProbeSet, write_probes
from deploy_targets.profile import GateSpec, TargetProfile, load_profile
from deploy_targets.protocols import Engine
from deploy_targets.types import Sampling
from tests.models import EOS_ID

VERSION = 3
Shift = Callable[[np.ndarray], np.ndarray]


def make_artifact(
    model_dir: Path,
    folder: Path,
    *,
    num_sequences: int = 20,
    shift: Shift = lambda logps: logps,
    tolerance: float = 0.01,
    accuracy: float | None = 1.0,
    gates: GateSpec | None = None,
    expected: Sequence[float | None] | None = None,
) -> Manifest:
    """Probes of `num_sequences` x 20 tokens whose learner log-probs are `shift` of the fake engine's own.

    `expected`: the rewards that the export got, for a task sample that carries them.
    """
    shutil.copytree(model_dir, folder)
    engine = FakeEngine(folder, {}, VERSION)
    profile = load_profile("fake").model_copy(update={"gates": gates or GateSpec()})
    manifest = seal(
        folder, engine, profile, num_sequences=num_sequences, shift=shift, tolerance=tolerance, accuracy=accuracy, expected=expected
    )
    engine.close()
    return manifest


def seal(
    folder: Path,
    engine: Engine,
    profile: TargetProfile,
    *,
    num_sequences: int = 20,
    shift: Shift = lambda logps: logps,
    tolerance: float = 0.01,
    accuracy: float | None = None,
    expected: Sequence[float | None] | None = None,
) -> Manifest:
    """An artifact of the folder that `engine` serves, with what it answers itself as the learner's log-probs, but for `shift`."""
    prompts = [[3 + i % 10, 13, 4 + i % 7, 17] for i in range(num_sequences)]
    generations = engine.generate(prompts, Sampling(max_tokens=20, seed=1))
    sequences = [generation.sequence for generation in generations]
    scores = engine.score(sequences)
    probes = [Probe(seq, shift(s.logps).astype(np.float32), s.greedy_tokens) for seq, s in zip(sequences, scores, strict=True)]
    write_probes(folder / PROBES_FILE, ProbeSet(tuple(probes), 1.0, engine.weight_version))
    rows: list[dict[str, object]]
    rows = [{"prompt_tokens": prompt, "prompt": f"p{i}", "columns": {"answer": i}} for i, prompt in enumerate(prompts)]
    if expected is not None:
        rows = [{**row, "expected": value} for row, value in zip(rows, expected, strict=True)]
    (folder / TASK_SAMPLE_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return write_manifest(
        folder,
        profile=profile,
        weight_version=engine.weight_version,
        source_model="tiny",
        floor=0.004,
        tolerance=tolerance,
        sampling=SamplingRecord(max_tokens=8, stop_token_ids=(EOS_ID,)),
        final_gap=0.006,
        task=None if accuracy is None else TaskRecord(accuracy=accuracy, num_problems=num_sequences, reward="exact"),
    )
