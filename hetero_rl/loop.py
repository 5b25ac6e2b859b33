"""THE file: one run, from the first floor to the exported artifact.

    problems ─▶ engine.generate ─▶ reward ─▶ advantage ─┐
                    ▲                                    ▼
              publish + proof ◀─ learner.update(policy loss + lambda * cost) ─▶ gap ─▶ dual step on lambda

What is left out on purpose: a critic, a reference model, replay. Sampling and learning take turns.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deploy_targets.errors import EngineError
from deploy_targets.profile import TargetProfile
from deploy_targets.types import TokenSequence
from hetero_rl.ahead import Ahead, Logps
from hetero_rl.algorithm.advantage import advantages
from hetero_rl.algorithm.constraint import DualConfig, dual_step, infeasible_message
from hetero_rl.algorithm.discrepancy import token_gap
from hetero_rl.algorithm.kinds import PAIRED
from hetero_rl.algorithm.tolerance import mean_gap
from hetero_rl.checkpoint import LoopState, newest_whole, recovered, save_checkpoint
from hetero_rl.config import ConstraintConfig, RunConfig
from hetero_rl.export import export_artifact
from hetero_rl.floor import measure_start, measured_anew
from hetero_rl.interrupt import saved_on_failure, stop_signals
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.metrics import MetricsWriter
from hetero_rl.parts import Inputs, Parts, assemble
from hetero_rl.pool import pool_row
from hetero_rl.publish import Publisher
from hetero_rl.rollout import accuracy, collect, sample, train_sequences
from hetero_rl.run_folder import RunFolder
from hetero_rl.step_metrics import Clock, Row, first_row, step_row
from hetero_rl.types import TrainSequence
from hetero_rl.view import View


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended; `artifact` is None when it was interrupted, by the signal `stopped_by`."""

    step: int
    artifact: Path | None
    start_accuracy: float | None
    final_accuracy: float | None
    stopped_by: int | None = None


def train(config: RunConfig, profile: TargetProfile, run: RunFolder, view: View, inputs: Inputs, *, resume: bool = False) -> TrainResult:
    """Train, publish after every step, export at the end; Ctrl-C or SIGTERM finishes the step, saves and returns."""
    loop, gate = config.loop, config.loop.publish_gate
    with ExitStack() as stack:
        checkpoint = newest_whole(recovered(run.checkpoints), view.warn) if resume else None
        parts = assemble(config, profile, run.serving, view, stack, inputs, checkpoint)
        task, learner, publisher, sampling = parts.task, parts.learner, parts.publisher, parts.sampling
        state = parts.restored
        if state is None:
            view.phase("measuring the floor")
            state = measure_start(config, parts)
            state = replace(state, row=first_row(state))
        metrics = stack.enter_context(MetricsWriter(run.path, state.metrics_offset if resume else None))
        snapshot = learner.snapshot() if loop.publish_every > 1 else None
        make = lambda step, lap: collect(publisher.engine, task, sampling, loop, step, lap)  # noqa: E731 - a rebuild changes the engine
        ahead = stack.enter_context(Ahead(make, state.step, state.ahead))
        stopped_by = stack.enter_context(stop_signals(view))
        clock = Clock(state.row)
        view.start(config, profile, state)

        def save(state: LoopState) -> None:
            sampled = ahead.packed(lambda sequences: old_logps(learner, snapshot, sequences)) or state.ahead
            state = replace(state, calibration=publisher.calibration, num_rebuilds=publisher.num_rebuilds, ahead=sampled)
            save_checkpoint(run.checkpoints, state, learner, config.checkpoint)

        while True:
            # Served and proven, a step is still to be measured and written: the last one, or that of which a resume finds this undone.
            if state.row is not None:
                with saved_on_failure(save, state, config, view):
                    state, row = measured(state, state.row, config, parts, clock)
                metrics.write(row)
                view.step(row)
                state = replace(state, row=None, metrics_offset=metrics.offset)
                if state.step and is_checkpoint(config, state.step):
                    save(state)
            # An interrupt takes effect where learner and engine hold the same weights, so that a resume finds both again.
            if state.step == loop.num_steps or (stopped_by and loop.publishes(state.step)):
                break

            clock = Clock()
            with saved_on_failure(save, state, config, view):
                rollouts, phases, logps = ahead.take(state.step)
                clock.lap("perf/wait_s")
                advantage = advantages(config.algorithm.advantage, torch.from_numpy(rollouts.rewards))
                sequences = train_sequences(rollouts, advantage.numpy())
            if logps is None and snapshot is not None:
                logps = old_logps(learner, snapshot, sequences)
            if logps is not None:
                sequences = [replace(sequence, learner_old_logp=old) for sequence, old in zip(sequences, logps, strict=True)]
            if loop.schedule == "one_step_off":
                snapshot = None
                if not is_checkpoint(config, state.step + 1):
                    snapshot = learner.snapshot()
                    ahead.start(state.step + 1)
            multiplier, dual_config = state.dual.multiplier, controller(config, state.tolerance)
            if gate is not None:
                learner.keep_masters()
            update = learner.update(sequences, multiplier)
            gap = update.sums.gap
            dual = dual_step(state.dual, gap.mean_engine_gap, dual_config, rollouts.mean_reward)
            if dual.bound != state.dual.bound:
                view.warn(infeasible_message(dual, dual_config, state.floor.mean))
            clock.lap("perf/learner_s")
            ahead.wait()
            clock.lap("perf/wait_s")

            state = replace(state, step=state.step + 1, dual=dual, num_ranks=learner.ranks.size, deployed_accuracy=None, ahead=None)
            row = step_row(state, rollouts, phases, update, multiplier) | clock.row()
            state = replace(state, row=row)
            if loop.publishes(state.step):
                state = replace(state, weight_version=state.weight_version + 1)
                # What no engine takes, a resume serves and proves by its start; not where a gate is to judge it first.
                with saved_on_failure(save, state, config, view, EngineError) if gate is None else nullcontext():
                    publisher.publish(state.weight_version, rollouts.sequences)
                if gate is not None and not engine_gap(parts, config.constraint, rollouts.sequences) <= gate * gap.mean_engine_gap:
                    learner.restore_masters()
                    state = replace(state, weight_version=state.weight_version + 1, row=row | {"publish/rejected": 1})
                    publisher.publish(state.weight_version, rollouts.sequences)
                snapshot = learner.snapshot() if loop.publish_every > 1 else snapshot
            clock.lap("perf/publish_s")
            if publisher.num_rebuilds and not state.num_rebuilds:
                view.warn(rebuilt_message(profile, publisher))
            state = replace(state, num_rebuilds=publisher.num_rebuilds, calibration=publisher.calibration)

        if state.step < loop.num_steps:
            save(state)
            return TrainResult(state.step, None, state.start_accuracy, None, stopped_by[0])
        view.phase("exporting the artifact")
        artifact_accuracy = export_artifact(config, profile, parts, state, run.artifact)
        return TrainResult(state.step, run.artifact, state.start_accuracy, artifact_accuracy)


def is_checkpoint(config: RunConfig, step: int) -> bool:
    """Whether one is made after `step` steps; the step after it samples for itself (ahead.py)."""
    return step == config.loop.num_steps or step % config.checkpoint.every_steps == 0


def measured(state: LoopState, row: Row, config: RunConfig, parts: Parts, clock: Clock) -> tuple[LoopState, Row]:
    """`state` and the metrics of its step, with all that is known once its weights are served: proof, floor, accuracy."""
    row = {**row, "publish/rebuilds": parts.publisher.num_rebuilds}
    if config.loop.publishes(state.step):
        row["publish/proof_gap"] = parts.publisher.proof_gap
    if measures_floor(config, state.step):
        state = measured_anew(state, config, parts)
        row |= {"constraint/floor": state.floor.mean, "constraint/tolerance": state.tolerance}
        clock.lap("perf/floor_s")
    if state.step % config.evaluation.every_steps == 0 or state.step == config.loop.num_steps:
        is_end = state.step in (0, config.loop.num_steps)
        row |= evaluate(parts, config.evaluation.num_final_problems if is_end else config.evaluation.num_problems)
        clock.lap("perf/eval_s")
        accuracy = row["eval/deployed_accuracy"]
        # That of step 0 is of no update, and no checkpoint's.
        state = replace(state, deployed_accuracy=accuracy) if state.step else replace(state, start_accuracy=accuracy)
    return state, row | pool_row(parts.publisher.engine) | (clock.row() if state.step else {})


def measures_floor(config: RunConfig, step: int) -> bool:
    """Whether the floor is measured anew after `step` steps; before the first it was, and after the last there is nothing to bound."""
    every = config.constraint.floor_every
    return every > 0 and step % every == 0 and 0 < step < config.loop.num_steps


def controller(config: RunConfig, tolerance: float) -> DualConfig:
    """The constants of the dual step for this run."""
    constraint = config.constraint
    return DualConfig(
        tolerance=tolerance,
        eta=constraint.eta,
        lambda_max=constraint.multiplier_cap,
        lambda_min=constraint.lambda_min,
        # Where the gap did not fall by a signal that holds the engine constant, it will not: the penalty would only eat the reward.
        lambda_infeasible=constraint.multiplier_cap / 4 if constraint.signal in PAIRED else 0.0,
        ema=constraint.ema,
        patience=constraint.patience,
        controller="off" if constraint.signal == "off" else constraint.controller,
        kp=constraint.kp,
        kd=constraint.kd,
        reward_window=constraint.reward_window,
    )


def old_logps(learner: Learner, snapshot: int | None, sequences: list[TrainSequence]) -> list[Logps]:
    """Rollouts of an older version need the learner's log-probs under that version: engine gap and staleness stay apart."""
    assert snapshot is not None
    scores = learner.score_snapshot(snapshot, [s.sequence for s in sequences], [s.routes for s in sequences])
    return [score.logps for score in scores]


def engine_gap(parts: Parts, constraint: ConstraintConfig, sequences: list[TokenSequence]) -> float:
    """The mean gap over the responses of `sequences`, as the constraint measures it, under the weights that both hold now."""
    scores = parts.learner.score(sequences), parts.publisher.engine.score(sequences, parts.sampling.temperature)
    gaps = [token_gap(ours.logps, theirs.logps, constraint.measure) for ours, theirs in zip(*scores, strict=True)]
    return mean_gap(gaps, constraint.aggregation)


def evaluate(parts: Parts, num_problems: int) -> dict[str, float]:
    """Greedy accuracy on held-out problems, by the machine that serves and by the one that learns."""
    task, greedy = parts.task, replace(parts.sampling, temperature=0.0)
    problems = task.heldout_problems(num_problems)
    deployed = [generation.tokens for generation in sample(parts.publisher.engine, task, problems, 1, greedy)]
    learned = parts.learner.greedy_responses(
        [task.encode_prompt(problem) for problem in problems], greedy.max_tokens, greedy.stop_token_ids
    )
    return {"eval/deployed_accuracy": accuracy(task, problems, deployed), "eval/learner_accuracy": accuracy(task, problems, learned)}


def rebuilt_message(profile: TargetProfile, publisher: Publisher) -> str:
    """What a user reads, once a run, when new weights did not get into the running engine."""
    return (
        f"an update of engine {profile.engine.name!r} failed its proof, and the engine was started anew on the weights: "
        f"{publisher.rebuilt_because}. The metric publish/rebuilds counts such updates; where it rises at every step, set "
        'engine.publish = "rebuild" in the profile'
    )
