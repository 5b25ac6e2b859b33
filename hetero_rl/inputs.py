"""What the user gave, checked before anything is started or written; nothing heavy is imported until all that is cheap to check fits."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploy_targets.engines.options import OPTIONS, RETURN_ROUTES
from deploy_targets.errors import PreflightError, UsageError
from deploy_targets.families import routes_problem
from deploy_targets.preflight import check_target, preflight, read_object
from deploy_targets.profile import TargetProfile
from hetero_rl.config import RunConfig
from hetero_rl.model import load_tokenizer, resolve_model
from hetero_rl.tasks import load_task
from hetero_rl.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the user gave, found to fit together before anything was started or written."""

    model_dir: Path
    tokenizer: Any
    task: Task


def check_inputs(config: RunConfig, profile: TargetProfile) -> Inputs:
    """Find the model, check machine, packages, model and target against each other, load tokenizer, problems and reward.

    Raises `UsageError` and its branches: one error for all that can be told without the problems, then what is wrong with these, and
    last a prompt that is too long for the target.
    """
    missing = missing_packages(profile)
    try:
        model_dir = resolve_model(config.model.path)
    except UsageError as error:
        others = missing + check_target(profile)
        if not others:
            raise
        raise PreflightError(f"neither model nor target {profile.name!r} can be used", [str(error), *others]) from None
    response = config.loop.max_response_tokens
    also = missing + (replay_problems(profile, model_dir) if config.algorithm.routing_replay else [])
    if config.learner.offload == "nvme":
        from hetero_rl.learner.offload import offload_problems

        also += [] if missing else offload_problems(config.learner)
    preflight(profile, model_dir, num_tokens=1 + response, temperature=config.loop.temperature, also=also)
    tokenizer = load_tokenizer(model_dir)
    task = load_task(config.task, tokenizer, config.loop.seed)
    preflight(profile, model_dir, num_tokens=task.longest_prompt() + response)
    return Inputs(model_dir, tokenizer, task)


def replay_problems(profile: TargetProfile, model_dir: Path) -> list[str]:
    """Why `algorithm.routing_replay` cannot be had from this target with this model, one line each."""
    problems = []
    known = OPTIONS.get(profile.engine.name)
    # What the engine of a plug-in can do is told by itself, when it is given the option.
    if known is not None and RETURN_ROUTES not in known.model_fields:
        able = ", ".join(sorted(name for name, options in OPTIONS.items() if RETURN_ROUTES in options.model_fields))
        problems.append(f"engine {profile.engine.name!r} returns no routes; the engines that do: {able}")
    with suppress(UsageError):  # a config.json that cannot be read is the preflight's to report
        problem = routes_problem(read_object(model_dir / "config.json"))
        problems += [] if problem is None else [problem]
    return [f"algorithm.routing_replay: {problem}" for problem in problems]


def missing_packages(profile: TargetProfile) -> list[str]:
    """The packages that learner and export need beyond those of serving, and that are not installed: one line for each pip extra."""
    needed: dict[str, tuple[str, ...]] = {"train": ("torch", "transformers", "deepspeed", "tensorboard")}
    if profile.engine.name == "onnxruntime":
        needed["onnx-export"] = ("onnx", "onnx_ir", "onnxruntime_genai")
    lines = []
    for extra, packages in needed.items():
        absent = [repr(package) for package in packages if find_spec(package) is None]
        if absent:
            lines.append(f"training for {profile.name!r} needs {', '.join(absent)}; install it with: pip install 'hetero-rl[{extra}]'")
    return lines
