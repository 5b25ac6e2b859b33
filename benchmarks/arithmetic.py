"""The learner's arithmetic on this CPU: one update in float32 against one in bfloat16, on the same bf16 weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import models
from benchmarks.common import arguments, in_turns, measurement, write
from benchmarks.constraint_cost import make_learner, make_sequences, update_seconds
from deploy_targets.types import TokenSequence
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.learner.model import load_causal_lm

DTYPES = ("float32", "bfloat16")
NUM_EXACT = 16


def logp_error(learner: Learner, model_dir: Path, sequences: list[TokenSequence]) -> float:
    """Mean abs difference to the log-probs of the same weights in fp64, in nats."""
    exact = load_causal_lm(model_dir).double()
    errors = []
    for sequence, score in zip(sequences, learner.score(sequences), strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([sequence.tokens])).logits[0, sequence.prompt_len - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(sequence.tokens[sequence.prompt_len :])[:, None])[:, 0]
        errors.append(np.abs(score.logps - expected.numpy()))
    return float(np.concatenate(errors).mean())


def main() -> None:
    options = arguments("arithmetic", __doc__, rounds=9)
    torch.set_num_threads(options.threads)
    num_sequences, max_tokens = (16, 16) if options.quick else (256, 64)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = models.tiny(Path(folder) / "model", quick=options.quick)
        learners = {dtype: make_learner(model_dir, learner={"compute_dtype": dtype}) for dtype in DTYPES}
        sequences = make_sequences(learners["float32"], num_sequences, max_tokens)
        scored = [s.sequence for s in sequences[:NUM_EXACT]]
        errors = {dtype: logp_error(learner, model_dir, scored) for dtype, learner in learners.items()}
        times = in_turns({dtype: update_seconds(learner, sequences, 0.0) for dtype, learner in learners.items()}, options.rounds)
        for learner in learners.values():
            learner.close()
        update = measurement(
            times["float32"], "s per update", baseline=times["bfloat16"], ratio_of="bfloat16 seconds / float32 seconds", inverse=True
        )
        settings = {"model": models.describe(model_dir), "num_sequences": num_sequences, "response_tokens": max_tokens}
        write(options, {"update": update}, "update", settings | {"mean_abs_logp_error_nats": errors})


if __name__ == "__main__":
    main()
