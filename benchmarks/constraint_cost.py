"""What the pieces of the method cost: measuring and correcting as a share of an update, each signal and the rounded forward against it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks import models
from benchmarks.common import Measurement, arguments, in_turns, measurement, write
from deploy_targets.catalog import make_quantizer
from deploy_targets.types import TokenSequence
from hetero_rl.algorithm.constraint import DualConfig, DualState, dual_step
from hetero_rl.algorithm.corrections import correction_weights
from hetero_rl.algorithm.discrepancy import GapSums, split_gap
from hetero_rl.algorithm.kinds import DEFAULT_BOUNDS, Correction
from hetero_rl.algorithm.segments import Segments
from hetero_rl.config import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.learner.batching import micro_batches
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.types import TrainSequence

TARGET = "int4-onnx"
MULTIPLIER = 0.3
CORRECTION: Correction = "mis_sequence"
PROMPT_TOKENS = 8
REPEATS = 5
"""Calls timed together: one takes a fraction of a ms, and a preempted one would stand for all."""


VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "grey_box": {"constraint": {"signal": "grey_box"}},
    "grey_box_top": {"constraint": {"signal": "grey_box", "grey_box_form": "top"}},
    "grey_box_sampled": {"constraint": {"signal": "grey_box", "grey_box_form": "sampled"}},
    "grey_box_share": {"constraint": {"signal": "grey_box", "grey_box_share": 0.34}},
    "flatness": {"constraint": {"signal": "flatness"}},
    "score_centering": {"algorithm": {"score_centering": True}},
    "fake_quant": {"learner": {"forward": "fake_quant"}},
}
"""Updates that are held against one without a signal."""
AT_100M = ("grey_box", "grey_box_share", "fake_quant")
BATCH = {"tiny": (256, 64), "100M": (32, 32)}
"""Responses, and the tokens of each."""


def make_learner(model_dir: Path, **tables: dict[str, object]) -> Learner:
    """A learner without a signal; `tables` are its `[learner]`, `[algorithm]` and `[constraint]`."""
    return Learner(
        model_dir,
        make_quantizer(models.load_profile(TARGET), model_dir),
        LearnerConfig.model_validate(tables.get("learner", {})),
        AlgorithmConfig.model_validate(tables.get("algorithm", {})),
        ConstraintConfig.model_validate({"signal": "off", **tables.get("constraint", {})}),
        temperature=1.0,
        num_updates=1000,
        max_response_tokens=9,
        seed=0,
    )


def make_sequences(learner: Learner, num_sequences: int, max_tokens: int) -> list[TrainSequence]:
    """Random tokens with the twin's log-probs in the engine's place: what the engine answers up to its kernels' rounding."""
    rng = np.random.default_rng(0)
    vocab_size = int(learner.policy.lm.config.vocab_size)
    tokens = rng.integers(3, vocab_size, size=(num_sequences, PROMPT_TOKENS + max_tokens))
    scores = learner.score([TokenSequence(tuple(map(int, row)), PROMPT_TOKENS) for row in tokens], as_twin=True)
    return [
        TrainSequence(tuple(map(int, row[:PROMPT_TOKENS])), row[PROMPT_TOKENS:].astype(np.int32), score.logps, float(advantage))
        for row, score, advantage in zip(tokens, scores, rng.standard_normal(num_sequences), strict=True)
    ]


def update_seconds(learner: Learner, sequences: list[TrainSequence], multiplier: float) -> Callable[[], float]:
    """One call of `Learner.update`, in seconds."""

    def run() -> float:
        start = time.perf_counter()
        learner.update(sequences, multiplier)
        return time.perf_counter() - start

    return run


def update_after_a_publish(learner: Learner, sequences: list[TrainSequence], multiplier: float) -> Callable[[], tuple[float, float]]:
    """One call of `Learner.update` in seconds of the clock, and of the processor over all threads.

    As in a run, the proof of a publish has run the twin before it: where the update needs the rounded weights, they are there.
    """

    def run() -> tuple[float, float]:
        learner.score([sequences[0].sequence], as_twin=True)
        start, busy = time.perf_counter(), time.process_time()
        learner.update(sequences, multiplier)
        return time.perf_counter() - start, time.process_time() - busy

    return run


def measuring_seconds(learner: Learner, sequences: list[TrainSequence]) -> Callable[[], tuple[float, float]]:
    """`split_gap` and `correction_weights` on every micro-batch of that update and one `dual_step`, in seconds as above."""
    prompts, responses = [s.prompt for s in sequences], [s.tokens for s in sequences]
    scored = learner.score([s.sequence for s in sequences])
    parts = []
    for batch in micro_batches(prompts, responses, learner.config.tokens_per_micro_batch, learner.device, packed=learner.packed):
        learner_logp = batch.flatten([score.logps for score in scored], learner.device)
        engine_logp = batch.flatten([s.engine_logp for s in sequences], learner.device)
        parts.append((learner_logp, learner_logp.clone(), engine_logp, Segments.of(batch.lengths, learner.device)))
    config = DualConfig(tolerance=0.01, eta=0.05, lambda_max=2.0, lambda_infeasible=MULTIPLIER)

    def run() -> tuple[float, float]:
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(REPEATS):
            gap = GapSums()
            for learner_logp, old_logp, engine_logp, segments in parts:
                gap = gap + split_gap(learner_logp, old_logp, engine_logp, segments)
                mask = torch.isfinite(engine_logp)
                correction_weights(CORRECTION, old_logp, engine_logp, mask, segments, DEFAULT_BOUNDS[CORRECTION])
            dual_step(DualState(MULTIPLIER), gap.mean_engine_gap, config)
        return (time.perf_counter() - start) / REPEATS, (time.process_time() - busy) / REPEATS

    return run


def costs(model_dir: Path, variants: Sequence[str], batch: tuple[int, int], rounds: int) -> dict[str, Measurement]:
    """`measuring` and each of `variants` against an update without a signal, in turns; `batch` is responses and their tokens."""
    with ExitStack() as stack:
        learners = {name: make_learner(model_dir, **VARIANTS.get(name, {})) for name in ("off", *variants)}
        for learner in learners.values():
            stack.callback(learner.close)
        sequences = make_sequences(learners["off"], *batch)
        multipliers = {name: 0.0 if name == "off" else MULTIPLIER for name in learners}
        times = in_turns(
            {"measuring": measuring_seconds(learners["off"], sequences)}
            | {name: update_after_a_publish(learner, sequences, multipliers[name]) for name, learner in learners.items()},
            rounds,
        )
    off = times.pop("off")
    found = {}
    for name, pairs in times.items():
        unit, scale, what = ("ms", 1e3, "split_gap + correction_weights + dual_step") if name == "measuring" else ("s", 1.0, "update")
        found[name] = measurement(
            [scale * wall for wall, _ in pairs],
            f"{unit} per update",
            baseline=[scale * wall for wall, _ in off],
            ratio_of=f"{what} / update with the signal off, times",
            # What else runs on the machine shows in the clock's ratios, and hardly in these.
            cpu_ratios=[busy / of_off for (_, busy), (_, of_off) in zip(pairs, off, strict=True)],
        )
    return found


def main() -> None:
    options = arguments("constraint_cost", __doc__, rounds=9, sizes=list(BATCH))
    torch.set_num_threads(options.threads)
    cases: dict[str, Measurement] = {}
    settings: dict[str, object] = {"prompt_tokens": PROMPT_TOKENS, "target": TARGET, "lambda": MULTIPLIER, "correction": CORRECTION}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes or (["tiny"] if options.quick else list(BATCH)):
            model_dir = models.tiny(Path(folder) / size, quick=True) if options.quick else models.SIZES[size](Path(folder) / size)
            batch = (16, 16) if options.quick else BATCH[size]
            settings[size] = {**models.describe(model_dir), "num_sequences": batch[0], "response_tokens": batch[1]}
            found = costs(model_dir, list(VARIANTS) if size == "tiny" else AT_100M, batch, options.rounds)
            cases |= {f"{name}/{size}": case for name, case in found.items()}
        write(options, cases, next(iter(cases)), settings)


if __name__ == "__main__":
    main()
