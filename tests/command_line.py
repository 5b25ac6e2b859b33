"""Runs the real command line in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import METRICS, read_metrics

SHORT_RUN = (
    "loop.num_steps=4", "loop.prompts_per_step=8", "loop.samples_per_prompt=4", "loop.max_response_tokens=8",
    "constraint.floor_tokens=256", "evaluation.every_steps=2", "evaluation.num_problems=32", "evaluation.num_final_problems=64",
    "checkpoint.every_steps=2", "learner.compute_dtype=float32",
)  # fmt: skip
"""Settings of a run that takes seconds; in one arithmetic, whatever is faster while other tests run."""

LONGEST_S = float(os.environ.get("HETERO_RL_TESTS_LONGEST_S", "300"))
"""Seconds that a command may take; more of them for a machine with much else to do."""


def hetero_rl(*arguments: str | Path, cwd: Path, timeout_s: float = LONGEST_S, **environment: str) -> subprocess.CompletedProcess[str]:
    """`hetero-rl ARGUMENTS` in the folder `cwd`; output captured."""
    return subprocess.run(
        [sys.executable, "-m", "hetero_rl", *map(str, arguments)],
        cwd=cwd,
        env=environment_of(environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def environment_of(extra: dict[str, str]) -> dict[str, str]:
    """The environment of a command: offline, no colours, lines not folded."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "240", "NO_COLOR": "1", **extra}


def with_settings(*settings: str) -> list[str]:
    """--set for each of `settings`."""
    return [argument for setting in settings for argument in ("--set", setting)]


def fails(result: subprocess.CompletedProcess[str], exit_code: int, *fragments: str) -> None:
    """One clear error: the exit code, every fragment in the message, no traceback."""
    assert result.returncode == exit_code, result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr, (fragment, result.stderr)


def at_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has done so many steps."""
    deadline = time.monotonic() + 300  # the first start in an environment compiles
    while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) <= step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_resumes_as_uninterrupted(run: Path, folder: Path) -> None:
    """A copy in `folder` of `run`, which has checkpoints of steps 2 and 4, goes on from step 2 and ends with the same bits."""
    halfway = Path(shutil.copytree(run, folder / "run"))
    for gone in ("artifact", "serving", "checkpoints/step-000004"):
        shutil.rmtree(halfway / gone)
    result = hetero_rl("train", "--resume", "--run-dir", halfway, cwd=folder)
    assert result.returncode == 0, result.stderr
    first, again = ([{name: row[name] for name in row if METRICS[name].exact} for row in read_metrics(path)] for path in (run, halfway))
    assert first == again
    assert sha256_of(halfway / "artifact" / "model.safetensors") == sha256_of(run / "artifact" / "model.safetensors")
