"""Every logged metric, defined once: name, unit, formula. `docs/metrics.md` is made from this table.

One JSON object a step goes to `metrics.jsonl`; the same numbers go to TensorBoard.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """Unit and formula of a metric; `exact` is False for wall-clock readings, which no resume reproduces."""

    unit: str
    formula: str
    exact: bool = True


METRICS: dict[str, Metric] = {
    "step": Metric("count", "steps done so far, each one batch of rollouts and learner.updates_per_rollout updates; 0 is before any"),
    "reward/mean": Metric("reward", "mean reward of the step's responses, as the engine sampled them"),
    "reward/std": Metric("reward", "standard deviation of the same rewards"),
    "reward/dropped": Metric("count", "responses for which the reward function gave None"),
    "reward/flat_groups": Metric("share", "groups whose rewards are all equal: they carry no learning signal"),
    "rollout/replaced_groups": Metric("groups", "groups of equal rewards that were replaced by others (`loop.resample_rounds`)"),
    "rollout/tokens": Metric("tokens", "sampled tokens of the step, those of replaced groups included"),
    "rollout/response_tokens": Metric("tokens", "mean length of a response"),
    "rollout/truncated": Metric("share", "responses that ended at the length limit"),
    "eval/deployed_accuracy": Metric("share", "held-out problems with reward 1, greedy, decoded by the deployment engine"),
    "eval/learner_accuracy": Metric("share", "the same problems, greedy, decoded by the bf16 learner"),
    "constraint/engine_gap": Metric(
        "of constraint.measure", "mean gap, abs(p_learner(y) - p_engine(y)) if not set otherwise; same weight version, two machines"
    ),
    "constraint/staleness_gap": Metric(
        "of constraint.measure", "mean gap of the learner now to the learner old: same machine, two weight versions"
    ),
    "constraint/kl_k3": Metric("nats", "mean of exp(d) - 1 - d, d = log p_learner(y) - log p_engine(y), same weight version"),
    "constraint/floor": Metric(
        "of constraint.measure",
        "the engine gap with the same weights on both sides: before any update, or when `constraint.floor_every` last asked",
    ),
    "constraint/tolerance": Metric("of constraint.measure", "the bound on the engine gap"),
    "constraint/lambda": Metric("1", "multiplier of the constraint's cost in the step's loss"),
    "constraint/gap_ema": Metric("of constraint.measure", "the averaged engine gap that drives lambda"),
    "constraint/cost": Metric(
        "nats or probability", "mean per-token cost of the signal: KL(twin || learner) for grey_box, abs(dp) for loss"
    ),
    "constraint/infeasible": Metric("flag", "1 once the constraint was given up and lambda bounded"),
    "engine/nonfinite_logprobs": Metric("count", "sampled tokens without a finite engine log-prob: masked out and counted here"),
    "learner/policy_loss": Metric("1", "clipped surrogate, mean over response tokens"),
    "learner/entropy": Metric("nats", "mean entropy of the learner's next-token distribution at response tokens"),
    "learner/clip_fraction": Metric("share", "response tokens whose gradient the clip stops"),
    "learner/effective_share": Metric(
        "share", "effective sample size of the engine correction's weights over the response tokens; 1 without a correction, 0: all dropped"
    ),
    "learner/router_agreement": Metric(
        "share",
        "of the tokens that predict a response token, times the layers of experts: where the learner's own router chooses the engine's "
        "set of experts; null where the engine returns no routes",
    ),
    "learner/grad_norm": Metric("1", "global gradient norm before clipping"),
    "learner/lr": Metric("1", "learning rate of the step"),
    "learner/skipped_steps": Metric("count", "optimizer steps skipped for a non-finite loss or gradient"),
    "weights/version": Metric("count", "weight version the engine served for this step's rollouts"),
    "publish/proof_gap": Metric("probability", "mean abs(p_twin - p_engine) on the proof's probe tokens after the step's publish"),
    "publish/rebuilds": Metric("count", "engines rebuilt since the start because a proof failed"),
    "publish/rejected": Metric("", "1 when the step was undone, because the gap rose beyond `loop.publish_gate`"),
    "engines/serving": Metric("count", "engines of the pool (`[[engines]]`) that serve the weights of now", exact=False),
    "engines/resent": Metric("count", "requests since the start that were asked of another engine because one failed", exact=False),
    "engines/restarts": Metric("count", "engines since the start that came back after they had failed", exact=False),
    "perf/step_s": Metric("s", "wall-clock time of the step", exact=False),
    "perf/wait_s": Metric("s", "what the learner waited for rollouts; with `one_step_off` less than they took", exact=False),
    "perf/rollout_s": Metric("s", "sampling by the engine", exact=False),
    "perf/reward_s": Metric("s", "the reward function", exact=False),
    "perf/learner_s": Metric("s", "forward, backward, optimizer", exact=False),
    "perf/publish_s": Metric("s", "quantize, swap, proof", exact=False),
    "perf/eval_s": Metric("s", "evaluation, when there was one", exact=False),
    "perf/floor_s": Metric("s", "measuring the floor anew, when it was (`constraint.floor_every`)", exact=False),
    "perf/rollout_tokens_per_s": Metric("tokens/s", "rollout/tokens over perf/rollout_s", exact=False),
}

PHASES = {"rollout": "perf/rollout_s", "learner": "perf/learner_s", "publish": "perf/publish_s", "reward": "perf/reward_s"}
"""What every step spends its time on: the name a person reads, and the metric. Evaluation is left out: few steps have one."""


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard. A name that is not in `METRICS` is a mistake of ours."""

    def __init__(self, run_dir: Path, offset: int | None = None) -> None:
        """Open the files of `run_dir`; a resumed run cuts `metrics.jsonl` to the `offset` (bytes) of its checkpoint."""
        from torch.utils.tensorboard.writer import SummaryWriter

        path = run_dir / "metrics.jsonl"
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        if offset is not None:
            self._file.truncate(min(offset, path.stat().st_size))
        first_step = path.read_bytes().count(b"\n")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step if offset is not None else None)

    def write(self, row: Mapping[str, float]) -> None:
        """Write one step; values that are NaN are written as null, so that every line is strict JSON."""
        unknown = set(row) - set(METRICS)
        assert not unknown, f"metrics without a definition: {unknown}"
        clean = {name: (None if isinstance(value, float) and not math.isfinite(value) else value) for name, value in row.items()}
        self._file.write((json.dumps(clean) + "\n").encode())
        self._file.flush()
        for name, value in clean.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, int(row["step"]))

    @property
    def offset(self) -> int:
        """Bytes of `metrics.jsonl` so far, which are on the disk: a checkpoint that counts on them may be there sooner."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, 2)

    def __enter__(self) -> MetricsWriter:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All rows of a run's `metrics.jsonl`; a half-written last line (a killed run) is left out."""
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def glossary() -> str:
    """The table of `docs/metrics.md`."""
    lines = ["| metric | unit | what it is |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| `{name}` | {metric.unit} | {metric.formula} |" for name, metric in METRICS.items()]) + "\n"
