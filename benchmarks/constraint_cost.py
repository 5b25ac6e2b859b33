"""What the constraint costs: measuring the gap as a share of the update, and the grey-box signal against none."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import models
from benchmarks.common import arguments, in_turns, measurement, write
from deploy_targets.catalog import make_quantizer
from deploy_targets.types import TokenSequence
from hetero_rl.algorithm.constraint import DualConfig, DualState, dual_step
from hetero_rl.algorithm.discrepancy import GapSums, split_gap
from hetero_rl.config import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.learner.batching import micro_batches
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.types import TrainSequence

TARGET = "int4-onnx"
MULTIPLIER = 0.3
PROMPT_TOKENS = 8
REPEATS = 5
"""Calls timed together: one takes a fraction of a ms, and a preempted one would stand for all."""


def make_learner(model_dir: Path, signal: str, config: LearnerConfig | None = None) -> Learner:
    """A learner of the shipped configuration unless told otherwise; `signal` is `off` or `grey_box`."""
    quantizer = make_quantizer(models.load_profile(TARGET), model_dir)
    constraint = ConstraintConfig.model_validate({"signal": signal})
    return Learner(
        model_dir,
        quantizer,
        config or LearnerConfig(),
        AlgorithmConfig(),
        constraint,
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


def measuring_seconds(learner: Learner, sequences: list[TrainSequence]) -> Callable[[], float]:
    """`split_gap` on every micro-batch of that update and one `dual_step`, in seconds, on the tensors of that update."""
    prompts, responses = [s.prompt for s in sequences], [s.tokens for s in sequences]
    scored = learner.score([s.sequence for s in sequences])
    parts = []
    for batch in micro_batches(prompts, responses, learner.config.tokens_per_micro_batch, learner.device, packed=learner.packed):
        learner_logp = batch.flatten([score.logps for score in scored], learner.device)
        parts.append((learner_logp, learner_logp.clone(), batch.flatten([s.engine_logp for s in sequences], learner.device)))
    config = DualConfig(tolerance=0.01, eta=0.05, lambda_max=2.0, lambda_infeasible=MULTIPLIER)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(REPEATS):
            gap = GapSums()
            for learner_logp, old_logp, engine_logp in parts:
                gap = gap + split_gap(learner_logp, old_logp, engine_logp)
            dual_step(DualState(MULTIPLIER), gap.mean(gap.engine_gap), config)
        return (time.perf_counter() - start) / REPEATS

    return run


def main() -> None:
    options = arguments("constraint_cost", __doc__, rounds=9)
    torch.set_num_threads(options.threads)
    num_sequences, max_tokens = (16, 16) if options.quick else (256, 64)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = models.tiny(Path(folder) / "model", quick=options.quick)
        plain, grey_box = make_learner(model_dir, "off"), make_learner(model_dir, "grey_box")
        sequences = make_sequences(plain, num_sequences, max_tokens)
        times = in_turns(
            {
                "off": update_seconds(plain, sequences, 0.0),
                "measuring": measuring_seconds(plain, sequences),
                "grey_box": update_seconds(grey_box, sequences, MULTIPLIER),
            },
            options.rounds,
        )
        plain.close()
        grey_box.close()
        cases = {
            "measuring": measurement(
                [seconds * 1e3 for seconds in times["measuring"]],
                "ms per update",
                baseline=[seconds * 1e3 for seconds in times["off"]],
                ratio_of="split_gap + dual_step / update with the signal off, times",
            ),
            "grey_box": measurement(
                times["grey_box"], "s per update", baseline=times["off"], ratio_of="update with the grey box / with the signal off, times"
            ),
        }
        settings = {"model": models.describe(model_dir), "num_sequences": num_sequences, "response_tokens": max_tokens}
        settings |= {"prompt_tokens": PROMPT_TOKENS, "target": TARGET, "lambda": MULTIPLIER}
        write(options, cases, "measuring", settings)


if __name__ == "__main__":
    main()
