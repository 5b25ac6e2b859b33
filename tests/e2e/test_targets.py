"""Every target that runs on this machine: train the demo, export, verify, by the command line.

`scripts/test.sh` runs one target of each family for a few steps; `scripts/test_targets.sh` all of them for twenty.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deploy_targets.preflight import check_target
from deploy_targets.profile import shipped_profiles
from deploy_targets.weights_file import WEIGHTS_FILES, sha256_of
from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, fails, hetero_rl, with_settings

CONFIG = Path(__file__).parents[2] / "configs" / "demo.toml"
NUM_STEPS = int(os.environ.get("HETERO_RL_TESTS_TARGET_STEPS", "2"))
FAMILIES = {"nf4-transformers", "q4_k_m-llamacpp", "int8-onnx"}
"""One target of each family besides int4-onnx, int4-vllm and int4-gptq-vllm, which have tests of their own (test_train.py and others)."""
PROFILES = shipped_profiles()
RUNNABLE = [name for name, profile in PROFILES.items() if not check_target(profile)]
TRAINED = [pytest.param(name, marks=() if name in FAMILIES else pytest.mark.variant) for name in RUNNABLE if name != "fake"]
"""`fake` serves no model."""
REFUSED = [name for name in PROFILES if name not in RUNNABLE]


def settings() -> list[str]:
    """Of a full job only the number of steps is cut."""
    steps = f"loop.num_steps={NUM_STEPS}"
    if NUM_STEPS < 20:
        return with_settings(*SHORT_RUN, steps)
    return with_settings(steps, "evaluation.num_problems=200", "evaluation.num_final_problems=500")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TRAINED)
def test_a_target_that_runs_here_trains_exports_and_verifies(name: str, tmp_path: Path) -> None:
    trained = hetero_rl("train", "--target", name, "--config", CONFIG, *settings(), "--run-dir", "run", cwd=tmp_path, timeout_s=1500)
    assert trained.returncode == 0, trained.stderr
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == NUM_STEPS
    assert all(row["engine/nonfinite_logprobs"] == 0 for row in rows[1:])
    assert rows[-1]["publish/rebuilds"] == 0, trained.stdout
    weights = {name: path for name in WEIGHTS_FILES if (path := tmp_path / "run" / "serving" / name).is_file()}
    assert len(weights) == 1
    for name, path in weights.items():
        assert sha256_of(path) == sha256_of(tmp_path / "run" / "artifact" / name)

    verified = hetero_rl("verify-deploy", "run/artifact", "--json", "verdict.json", cwd=tmp_path, timeout_s=600)
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verified.returncode == 0, verdict["gates"]
    assert verdict["verdict"] in ("pass", "warn")


@pytest.mark.parametrize("name", REFUSED)
def test_a_target_that_cannot_run_here_is_refused_with_its_reasons(name: str, tmp_path: Path) -> None:
    reasons = check_target(PROFILES[name])
    result = hetero_rl("train", "--target", name, "--config", CONFIG, "--run-dir", "run", cwd=tmp_path)
    fails(result, 2, *reasons)
    assert not (tmp_path / "run").exists()


def test_the_table_says_yes_or_why_not(tmp_path: Path) -> None:
    shown = hetero_rl("targets", "check", cwd=tmp_path).stdout.splitlines()
    for name in RUNNABLE:
        assert any(line.split()[:2] == [name, "yes"] for line in shown), name
    for name in REFUSED:
        assert any(line.split()[:2] == [name, "no"] and check_target(PROFILES[name])[0] in line for line in shown), name
