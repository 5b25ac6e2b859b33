"""What one engine, one rank and one publish cost here, each alone and on one thread: all that the simulation of this machine is given."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling.model import Costs, Decode
from benchmarks.worker import serve

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
STEPS = 33
"""Tokens of a timed response; the first is the prompt's."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A step of the runs that are measured."""

    num_prompts: int
    group_size: int
    max_tokens: int
    repeats: int


def body(connection: Connection, model_dir: Path, profile_file: Path, sizes: Sizes) -> None:
    """A learner and two engine processes; a request names what is asked of `Parts`, nothing: to calibrate."""
    with ExitStack() as stack:
        parts = Parts(model_dir, profile_file, sizes, stack)
        serve(connection, lambda what="calibrate": getattr(parts, what)())


class Parts:
    """The parts of a run with this profile, and a second engine beside the first."""

    def __init__(self, model_dir: Path, profile_file: Path, sizes: Sizes, stack: ExitStack) -> None:
        from rich.console import Console

        from deploy_targets.catalog import open_engine
        from hetero_rl.config import load_config
        from hetero_rl.loop import measure_start
        from hetero_rl.parts import assemble
        from hetero_rl.view import View

        self.sizes = sizes
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config, profile = load_config([], settings(model_dir, sizes), str(profile_file))
        own = profile.model_copy(update={"engine": profile.engine.model_copy(update={"process": "own"})})
        self.config, self.parts = config, assemble(config, own, folder / "serving", View(Console(quiet=True)), stack)
        measure_start(config, self.parts)
        self.engines = [self.parts.publisher.engine, open_engine(own, folder / "serving", 0)]
        stack.callback(self.engines[1].close)
        self.version = 0

    def seconds(self, *calls: Callable[[], Any]) -> list[float]:
        """The median of some calls of each, in turns."""
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(self.sizes.repeats):
            for call, own in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                own.append(time.perf_counter() - start)
        return [statistics.median(own) for own in times]

    def calibrate(self) -> dict[str, Any]:
        """Costs, the speed of a core where another computes as well, and lengths of responses."""
        decode, crowd = self.decode(), self.crowd()
        learner, lengths, prompt_tokens = self.learner()
        publish = self.publish()
        costs = Costs(decode=decode, **learner, **publish, reduce_s=0.0, pack_s=0.0, update_bytes=0.0)
        return {"costs": costs, "crowd": crowd, "lengths": lengths, "prompt_tokens": prompt_tokens}

    def response_lengths(self) -> list[int]:
        """Of one step's responses, as the engine samples them."""
        from hetero_rl.rollout import sample, seeded

        parts, loop = self.parts, self.config.loop
        problems = parts.task.train_problems(0, loop.prompts_per_step)
        generations = sample(self.engines[0], parts.task, problems, loop.samples_per_prompt, seeded(parts.sampling, loop.seed, 0))
        return [len(generation.tokens) for generation in generations]

    def generate(self, engine: int, num_responses: int, num_tokens: int) -> None:
        """Responses that all have as many tokens."""
        group = self.sizes.group_size
        problems = self.parts.task.train_problems(0, -(-num_responses // group))
        prompts = [self.parts.task.encode_prompt(problem) for problem in problems for _ in range(group)][:num_responses]
        self.engines[engine].generate(prompts, replace(self.parts.sampling, max_tokens=num_tokens, stop_token_ids=()))

    def decode(self) -> Decode:
        """Seconds of a token by batch size, and what a call and a response take beside it."""
        calls = [partial(self.generate, 0, size, num_tokens) for size in BATCH_SIZES for num_tokens in (1, STEPS)]
        times = self.seconds(*calls)
        first = times[::2]
        step = [(long - short) / (STEPS - 1) for short, long in zip(first, times[1::2], strict=True)]
        response_s, request_s = np.polyfit(BATCH_SIZES, first, 1)
        return Decode(BATCH_SIZES, tuple(step), max(0.0, float(request_s)), max(0.0, float(response_s)), BATCH_SIZES[-1])

    def crowd(self) -> float:
        """Speed of an engine while the other works too, over its speed alone."""
        alone = partial(self.generate, 0, BATCH_SIZES[-3], STEPS)

        def both() -> None:
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(lambda engine: self.generate(engine, BATCH_SIZES[-3], STEPS), (0, 1)))

        alone_s, both_s = self.seconds(alone, both)
        return min(1.0, alone_s / both_s)

    def learner(self) -> tuple[dict[str, float], tuple[int, ...], float]:
        """An update, solved for what is fixed, what a token costs, and what one with a gradient costs."""
        from hetero_rl.rollout import rewarded, sample, seeded, train_sequences

        parts, loop, learner = self.parts, self.config.loop, self.parts.learner
        problems = parts.task.train_problems(self.version, loop.prompts_per_step)
        sampling = seeded(parts.sampling, loop.seed, self.version)
        generations = sample(self.engines[0], parts.task, problems, loop.samples_per_prompt, sampling)
        start = time.perf_counter()
        rollouts = rewarded(parts.task, problems, generations, loop.samples_per_prompt)
        reward_s = (time.perf_counter() - start) / len(generations)
        sequences = train_sequences(rollouts, np.ones(rollouts.rewards.shape, np.float32))
        silent = [replace(sequence, advantage=0.0) for sequence in sequences]
        half = len(sequences) // 2
        drawn = [sequence.sequence for sequence in sequences]
        batches = (sequences, sequences[:half], sequences[:half] + silent[half:])
        *times, old_s = self.seconds(
            *(partial(learner.update, batch, 0.0) for batch in batches), lambda: learner.score_snapshot(learner.snapshot(), drawn)
        )
        first, whole = num_tokens(sequences[:half]), num_tokens(sequences)
        # Whole = fixed + train * tokens; half: the same with fewer; the last: the others of its tokens without a gradient.
        train_s = (times[0] - times[1]) / (whole - first)
        fixed_s = max(0.0, times[0] - train_s * whole)
        forward_s = (times[2] - times[1]) / (whole - first)
        costs = {"reward_s": reward_s, "learner_fixed_s": fixed_s, "forward_s": forward_s, "train_s": train_s, "old_logp_s": old_s / whole}
        return costs, tuple(len(generation.tokens) for generation in generations), float(np.mean([len(g.prompt) for g in generations]))

    def publish(self) -> dict[str, float]:
        """Phase by phase."""
        publisher, stats = self.parts.publisher, []
        for _ in range(max(2, self.sizes.repeats)):
            self.version += 1
            stats.append(publisher.publish(self.version))
        (score_s,) = self.seconds(lambda: publisher.engine.score(publisher.probes, self.parts.sampling.temperature))
        quantize_s, load_s, proof_s = (
            statistics.median(getattr(found, name) for found in stats) for name in ("quantize_s", "swap_s", "proof_s")
        )
        return {"quantize_s": quantize_s, "load_s": load_s, "twin_s": max(0.0, proof_s - score_s), "score_s": score_s}


def num_tokens(sequences: Sequence[Any]) -> int:
    """That the learner reads: each prompt once, and no response's last."""
    return sum(len(sequence.tokens) - 1 for sequence in sequences) + sum(map(len, {sequence.prompt for sequence in sequences}))


def settings(model_dir: Path, sizes: Sizes, num_steps: int = 8, schedule: str = "sync") -> list[str]:
    """Of the runs that are calibrated and measured: nothing but steps, in one arithmetic, at a learning rate that moves no length."""
    return [
        f"model.path={model_dir}", "recipe=plain", "task.digits=3", "task.reward=digits", "learner.compute_dtype=float32",
        "learner.lr=1e-6",
        f"loop.num_steps={num_steps}", f"loop.schedule={schedule}", f"loop.prompts_per_step={sizes.num_prompts}",
        f"loop.samples_per_prompt={sizes.group_size}", f"loop.max_response_tokens={sizes.max_tokens}", "constraint.floor_tokens=256",
        "checkpoint.every_steps=1000", "evaluation.every_steps=1000", "evaluation.num_problems=8", "evaluation.num_final_problems=8",
    ]  # fmt: skip
