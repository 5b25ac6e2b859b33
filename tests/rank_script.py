"""What tests/e2e/test_ranks.py starts on each rank: the same updates of a tiny model under every ZeRO stage; rank 0 writes what it saw.

python -m torch.distributed.run --nproc_per_node 2 tests/rank_script.py MODEL OUT [NUM_STEPS]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deploy_targets.catalog import make_quantizer
from deploy_targets.profile import load_profile
from deploy_targets.types import TokenSequence
from hetero_rl.algorithm.constraint import DualConfig, DualState, dual_step
from hetero_rl.config import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.learner.ranks import follow
from hetero_rl.types import TrainSequence

STAGES = (0, 1, 2, 3)
CALIBRATED_STAGES = (0, 3)
NUM_STEPS = 3


def batch(step: int) -> list[TrainSequence]:
    """Seven prompts of four responses each: no number of ranks divides them evenly."""
    draw = np.random.default_rng(step)
    sequences = []
    for prompt in range(7):
        for response in range(4):
            tokens = draw.integers(3, 30, draw.integers(2, 9)).astype(np.int32)
            logps = draw.normal(-3, 0.5, len(tokens)).astype(np.float32)
            sequences.append(TrainSequence((1, 2 + prompt, 5), tokens, logps, float(response - 1.5)))
    return sequences


def train(learner: Learner, told: list[float], num_steps: int) -> dict[str, Any]:
    """Updates with a multiplier that follows the gap; `told` gets those that this rank was given."""
    state, found = DualState(0.3), {"losses": [], "grad_norms": [], "gaps": [], "lambdas": []}
    for step in range(num_steps):
        update = learner.update(batch(step), state.multiplier)
        gap = update.sums.gap
        found["losses"].append(update.sums.mean(update.sums.policy_loss + state.multiplier * update.sums.cost))
        found["grad_norms"].append(update.grad_norm)
        found["gaps"].append(gap.mean_engine_gap)
        found["lambdas"].append(state.multiplier)
        state = dual_step(state, gap.mean_engine_gap, DualConfig(tolerance=0.01, eta=0.1, lambda_max=4.0, lambda_infeasible=1.0), 0.0)
    probes = [TokenSequence((*s.prompt, *s.tokens.tolist()), len(s.prompt)) for s in batch(9)]
    found["scores"] = np.concatenate([score.logps for score in learner.score(probes)]).tolist()
    found["weights"] = {name: float(tensor.float().square().sum()) for name, tensor in learner.named_tensors()}
    return found


def calibrated(model: Path, stage: int) -> dict[str, Any]:
    """What the twin of a GPTQ target says before and after the rounding is calibrated."""
    quantizer = make_quantizer(load_profile("int4-gptq-vllm"), model)
    learner = Learner(
        model, quantizer, LearnerConfig(zero_stage=stage, compute_dtype="float32"), AlgorithmConfig(), ConstraintConfig(),
        temperature=1.0, num_updates=1, max_response_tokens=8, seed=0,
    )  # fmt: skip
    found: dict[str, Any] = {}
    if learner.ranks.leads:
        probes = [TokenSequence((*s.prompt, *s.tokens.tolist()), len(s.prompt)) for s in batch(9)]
        for name in ("nearest", "calibrated"):
            found[name] = np.concatenate([score.logps for score in learner.score(probes, as_twin=True)]).tolist()
            learner.calibrate(probes)
        found["weights"] = {name: float(tensor.float().square().sum()) for name, tensor in learner.named_tensors()}
    else:
        follow(learner)
    learner.close()
    return found


def described(model: Path) -> dict[str, Any]:
    """Probes of a bf16 learner whose weights are spread: in bf16, then in float32 from weights that are gathered on the way, twice."""
    learner = Learner(
        model, make_quantizer(load_profile("int4-onnx"), model), LearnerConfig(zero_stage=3, compute_dtype="bfloat16"), AlgorithmConfig(),
        ConstraintConfig(), temperature=1.0, num_updates=1, max_response_tokens=8, seed=0,
    )  # fmt: skip
    found: dict[str, Any] = {}
    if learner.ranks.leads:
        probes = [TokenSequence((*s.prompt, *s.tokens.tolist()), len(s.prompt)) for s in batch(9)]
        for name in ("first", "again"):
            found[name] = np.concatenate([description.logps_fp32 for description in learner.describe(probes)]).tolist()
    else:
        follow(learner)
    learner.close()
    return found


def main(model: Path, out: Path, num_steps: int = NUM_STEPS) -> None:
    profile = load_profile("int4-onnx")
    found: dict[str, Any] = {}
    for stage in STAGES:
        learner = Learner(
            model, make_quantizer(profile, model), LearnerConfig(zero_stage=stage, compute_dtype="float32", updates_per_rollout=1, lr=1e-3),
            AlgorithmConfig(), ConstraintConfig(grey_box_share=0.5), temperature=1.0, num_updates=num_steps, max_response_tokens=8, seed=0,
        )  # fmt: skip
        told: list[float] = []
        update = learner.update

        def listened(sequences: Any, multiplier: float, update: Any = update, told: list[float] = told) -> Any:
            told.append(multiplier)
            return update(sequences, multiplier)

        learner.update = listened  # type: ignore[method-assign]
        if learner.ranks.leads:
            found[str(stage)] = train(learner, told, num_steps)
        else:
            follow(learner)
        learner.close()
        heard = json.dumps([value.hex() for value in told])
        (out / f"lambdas-{stage}-{learner.ranks.rank}").write_text(hashlib.sha256(heard.encode()).hexdigest())
    for stage in CALIBRATED_STAGES:
        found[f"calibrated-{stage}"] = calibrated(model, stage)
    found["described"] = described(model)
    if learner.ranks.leads:
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
