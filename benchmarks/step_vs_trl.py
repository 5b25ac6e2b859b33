"""One training step of hetero-rl against one step of TRL's GRPOTrainer: same model, prompts, reward and sizes, in turns.

Ours: rollout by the INT4 ONNX engine, reward, learner update, publish with its proof. TRL's: rollout by transformers'
`generate`, reward, update, on the CPU with beta = 0, in bf16 or float32, whichever is faster; nothing to publish.
Arms of ours: `plain` (the constraint is
measured, no signal) and `grey_box` (lambda 0.3, the twin runs beside the learner).
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import models
from benchmarks.common import Measurement, arguments, in_turns, measurement, summary, write
from benchmarks.own_step import OwnStep, StepSpec, gemm_flop_per_s
from benchmarks.worker import Worker, requests, serve

TARGET = "int4-onnx"
PHASES = ("rollout_s", "reward_s", "learner_s", "publish_s")
SIGNALS = {"plain": "off", "grey_box": "grey_box"}
WARMUPS = 1
CALIBRATION_ROUNDS = 2

DTYPES = ("bfloat16", "float32")

TrlChoice = tuple[int, str, bool]
"""TRL's micro-batch size, the dtype of its weights, and whether it autocasts to bf16 (its default)."""


def own_body(connection: Connection, spec: StepSpec, quick: bool) -> None:
    """A side of ours: one step per request, then the GEMM rate of the same moment."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        step = OwnStep(spec, Path(folder) / "serving", stack)
        serve(connection, lambda: {**step(), "gemm_flop_per_s": gemm_flop_per_s(quick)})


def trl_body(connection: Connection, spec: StepSpec, num_steps: int, micro_batch_size: int, dtype: str, autocast: bool) -> None:
    """TRL's side. Its trainer owns the loop, so a callback waits for the request before a step and answers after it.

    A step is timed from `on_step_begin` (the prompts are loaded, nothing else has begun) to `on_step_end`; the answer also
    holds the response length that TRL itself logged.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from hetero_rl.tasks import load_task
    from hetero_rl.tasks.base import Problem
    from hetero_rl.tasks.config import ArithmeticConfig

    torch.set_num_threads(spec.num_threads)
    tokenizer = AutoTokenizer.from_pretrained(spec.model_dir, padding_side="left")
    task = load_task(ArithmeticConfig(digits=3, reward="digits"), tokenizer, 0)
    problems = [problem for step in range(num_steps) for problem in task.train_problems(step, spec.num_prompts)]
    asked = requests(connection)

    def reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return task.reward([Problem(prompt, right, {}) for prompt, right in zip(prompts, answer, strict=True)], completions)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            next(asked)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.step_s = time.perf_counter() - self.start

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "completions/mean_length" in logs:
                shortest, mean = logs["completions/min_length"], logs["completions/mean_length"]
                num_tokens = round(mean * spec.num_prompts * spec.group_size)
                connection.send((True, {"step_s": self.step_s, "num_tokens": num_tokens, "shortest_response": shortest}))

    batch_size = spec.num_prompts * spec.group_size
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=batch_size // micro_batch_size,
            num_generations=spec.group_size,
            max_completion_length=spec.max_tokens,
            max_steps=num_steps,
            beta=0.0,
            learning_rate=1e-4,
            weight_decay=0.0,
            max_grad_norm=1.0,
            temperature=1.0,
            # The end-of-text token is never drawn, so that every response has its full length, as on our side.
            generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id]},
            model_init_kwargs={"dtype": dtype},
            bf16=autocast,
            use_cpu=True,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=str(spec.model_dir),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]),
            processing_class=tokenizer,
            callbacks=[Turns()],
        )
        connection.send((True, None))
        trainer.train()
        next(asked, None)


def fastest_trl(spec: StepSpec, rounds: int) -> tuple[dict[str, TrlChoice], dict[str, list[float]]]:
    """Give TRL its best: a few steps of each choice, in turns; returns the one with the fastest step of each dtype, and all seconds."""
    batch_size = spec.num_prompts * spec.group_size
    choices = list(product((batch_size // 4, batch_size), DTYPES, (False, True)))
    with ExitStack() as stack:
        workers = {choice: stack.enter_context(Worker(trl_body, spec, rounds + WARMUPS, *choice)) for choice in choices}
        steps = in_turns(workers, rounds, WARMUPS)
    seconds = {choice: [run["step_s"] for run in runs] for choice, runs in steps.items()}
    best = {dtype: min((c for c in choices if c[1] == dtype), key=lambda choice: min(seconds[choice])) for dtype in DTYPES}
    return best, {f"micro_batch {micro}, {dtype}, autocast {autocast}": runs for (micro, dtype, autocast), runs in seconds.items()}


def own_case(own: list[dict[str, float]], trl: list[dict[str, float]]) -> Measurement:
    """Seconds of our steps against TRL's, phases, and what learner and engine reach of the GEMM rate."""

    def share(flop: str, seconds: str) -> dict[str, Any]:
        flop_per_s = [run[flop] / run[seconds] for run in own]
        of_gemm = [rate / run["gemm_flop_per_s"] for rate, run in zip(flop_per_s, own, strict=True)]
        return {
            "flop_per_step": [run[flop] for run in own],
            "flop_per_s_median": summary(flop_per_s)[0],
            "share_of_gemm": dict(zip(("median", "low", "high"), summary(of_gemm), strict=True)),
        }

    return measurement(
        [run["step_s"] for run in own],
        "s per step",
        baseline=[run["step_s"] for run in trl],
        ratio_of="TRL seconds / hetero-rl seconds",
        inverse=True,
        phases_s={phase: dict(zip(("median", "low", "high"), summary([run[phase] for run in own]), strict=True)) for phase in PHASES},
        steps=own,
        tokens_per_step=[int(run["num_tokens"]) for run in own],
        trl_tokens_per_step=[int(run["num_tokens"]) for run in trl],
        bf16_gemm_flop_per_s=[run["gemm_flop_per_s"] for run in own],
        learner=share("update_flop", "learner_s"),
        engine=share("generate_flop", "rollout_s"),
    )


def main() -> None:
    options = arguments("step_vs_trl", __doc__, rounds=7)
    if find_spec("trl") is None:
        sys.exit("this benchmark compares with TRL, which is in none of the extras: pip install trl==1.16.0")
    num_prompts, group_size, max_tokens = (4, 4, 16) if options.quick else (32, 8, 64)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model_dir = models.tiny(Path(folder) / "model", quick=options.quick)
        specs = {
            arm: StepSpec(model_dir, TARGET, signal, num_prompts, group_size, max_tokens, options.threads)
            for arm, signal in SIGNALS.items()
        }
        choices, calibration = fastest_trl(specs["plain"], 1 if options.quick else CALIBRATION_ROUNDS)
        num_steps = options.rounds + WARMUPS
        sides = {dtype: stack.enter_context(Worker(trl_body, specs["plain"], num_steps, *choice)) for dtype, choice in choices.items()}
        sides |= {arm: stack.enter_context(Worker(own_body, spec, options.quick)) for arm, spec in specs.items()}
        steps = in_turns(sides, options.rounds, WARMUPS)
        wanted = num_prompts * group_size * max_tokens
        wrong = {side: run["num_tokens"] for side, runs in steps.items() for run in runs if run["num_tokens"] != wanted}
        if wrong:
            sys.exit(f"the sides did different work: {wrong} sampled tokens instead of {wanted}")
        settings = {
            "model": models.describe(model_dir),
            "num_prompts": num_prompts,
            "samples_per_prompt": group_size,
            "response_tokens": max_tokens,
            "prompt_tokens": int(steps["plain"][0]["prompt_tokens"]) // (num_prompts * group_size),
            "target": TARGET,
            "grey_box_lambda": steps["grey_box"][0]["multiplier"],
            "trl": {
                "choices": {dtype: {"micro_batch": micro, "bf16_autocast": autocast} for dtype, (micro, _, autocast) in choices.items()},
                "calibration_s": calibration,
                "beta": 0.0,
                "gradient_checkpointing": False,
                "generation": "transformers generate",
            },
        }
    fastest = min(DTYPES, key=lambda dtype: median(run["step_s"] for run in steps[dtype]))
    cases = {arm: own_case(steps[arm], steps[fastest]) for arm in SIGNALS}
    cases |= {f"{arm}_vs_trl_in_bf16": own_case(steps[arm], steps["bfloat16"]) for arm in SIGNALS}
    write(options, cases, "plain", {**settings, "fastest_trl": fastest})


if __name__ == "__main__":
    main()
