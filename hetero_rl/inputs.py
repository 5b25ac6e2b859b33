"""What the user gave, checked before anything is started or written; nothing heavy is imported until all that is cheap to check fits."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploy_targets.errors import PreflightError, UsageError
from deploy_targets.preflight import check_target, preflight
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
    preflight(profile, model_dir, num_tokens=1 + response, temperature=config.loop.temperature, also=missing)
    tokenizer = load_tokenizer(model_dir)
    task = load_task(config.task, tokenizer, config.loop.seed)
    preflight(profile, model_dir, num_tokens=task.longest_prompt() + response)
    return Inputs(model_dir, tokenizer, task)


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
