"""The floor: how far engine and learner are apart with the very same weights, before the first update and, where asked, on a schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy_targets.types import TokenSequence
from hetero_rl.algorithm.constraint import DualState
from hetero_rl.algorithm.discrepancy import token_gap
from hetero_rl.algorithm.tolerance import Floor, mean_gap, measure_floor, tolerance_from
from hetero_rl.checkpoint import LoopState
from hetero_rl.config import BF16_GAP, RunConfig
from hetero_rl.parts import Parts
from hetero_rl.publish import NUM_CALIBRATION_SEQUENCES
from hetero_rl.rollout import CALIBRATION_STEP, FLOOR_STEPS, sample, seeded

NUM_PROOF_PROBES = 8
PROOF_RESPONSE_TOKENS = 16


class Measured(NamedTuple):
    """Floor and tolerance in the measure of the constraint, and in the mean abs(dp) that an artifact is verified by."""

    floor: Floor
    tolerance: float
    served_floor: float
    served_tolerance: float
    sequences: list[TokenSequence]


def measure(config: RunConfig, parts: Parts) -> Measured:
    """The engine samples some thousand tokens, the learner scores them with the very same weights.

    The problems and seeds are the same at every call, so that two floors differ by the weights alone.
    """
    group_size, constraint = config.loop.samples_per_prompt, config.constraint
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    sequences: list[TokenSequence] = []
    num_tokens, batch = 0, 0
    while num_tokens < constraint.floor_tokens:
        # The run's own recipe, at lambda 0 and without an update: training problems, sampled under seeds beyond every step.
        problems = parts.task.train_problems(batch, config.loop.prompts_per_step)
        generations = sample(
            parts.publisher.engine, parts.task, problems, group_size, seeded(parts.sampling, config.loop.seed, FLOOR_STEPS + batch)
        )
        drawn = [g.sequence for g in generations]
        scores = parts.learner.score(drawn, routes=[g.routes for g in generations])
        pairs += [(score.logps, g.logps) for score, g in zip(scores, generations, strict=True)]
        sequences += drawn
        num_tokens, batch = sum(len(logps) for logps, _ in pairs), batch + 1
    gaps = [token_gap(*pair, constraint.measure) for pair in pairs]
    floor = measure_floor(gaps, group_size=group_size, aggregation=constraint.aggregation, seed=config.loop.seed)
    tolerance = tolerance_from(constraint.tolerance, constraint.tolerance_unit, floor, constraint.least_tolerance)
    # An artifact is verified by its mean abs(dp), whatever the run was held by: to a bound as many floors away.
    served_floor = floor.mean if constraint.is_probability else mean_gap([token_gap(*pair) for pair in pairs], "token")
    served_tolerance = tolerance if constraint.is_probability else max(served_floor * tolerance / floor.mean, BF16_GAP)
    return Measured(floor, tolerance, served_floor, served_tolerance, sequences)


def measure_start(config: RunConfig, parts: Parts) -> LoopState:
    """The state before the first update, with its floor, and the probes that every publish is proven on.

    A calibrated quantizer is calibrated before that, on what the engine samples with weights rounded to nearest.
    """
    if parts.publisher.awaits_calibration:
        problems = parts.task.train_problems(0, NUM_CALIBRATION_SEQUENCES)
        sampling = seeded(parts.sampling, config.loop.seed, CALIBRATION_STEP)
        parts.publisher.start_calibrated([g.sequence for g in sample(parts.publisher.engine, parts.task, problems, 1, sampling)])
    found = measure(config, parts)
    sequences = found.sequences
    probes = [shortened(sequence) for sequence in sequences[:: max(1, len(sequences) // NUM_PROOF_PROBES)][:NUM_PROOF_PROBES]]
    reference_gap = parts.publisher.calibrate(probes)
    return LoopState(
        step=0,
        weight_version=parts.publisher.engine.weight_version,
        dual=DualState(config.constraint.first_multiplier),
        floor=found.floor,
        tolerance=found.tolerance,
        served_floor=found.served_floor,
        served_tolerance=found.served_tolerance,
        probes=tuple(probes),
        reference_gap=reference_gap,
        calibration=parts.publisher.calibration,
        compute_dtype=parts.learner.compute_dtype,
        num_ranks=parts.learner.ranks.size,
    )


def measured_anew(state: LoopState, config: RunConfig, parts: Parts) -> LoopState:
    """`state` with the floor of the weights of now, and the tolerance in its units; engine and learner hold the same weights."""
    floor, tolerance, served_floor, served_tolerance, _ = measure(config, parts)
    return replace(state, floor=floor, tolerance=tolerance, served_floor=served_floor, served_tolerance=served_tolerance)


def shortened(sequence: TokenSequence) -> TokenSequence:
    """The beginning of a response is proof enough, and every publish pays for it."""
    return TokenSequence(sequence.tokens[: sequence.prompt_len + PROOF_RESPONSE_TOKENS], sequence.prompt_len)
