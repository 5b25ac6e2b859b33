"""A target whose weights are rounded by the run's own rollouts: what a run began with, another process must arrive at again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy_targets.weights_file import sha256_of
from hetero_rl.checkpoint import load_state
from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, assert_resumes_as_uninterrupted, hetero_rl, with_settings

pytest.importorskip("vllm.version")
pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "configs" / "demo.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on int4-gptq-vllm; tests must not change it."""
    folder = tmp_path_factory.mktemp("gptq")
    settings = with_settings(*SHORT_RUN)
    result = hetero_rl("train", "--target", "int4-gptq-vllm", "--config", CONFIG, *settings, "--run-dir", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_every_publish_is_proven_and_what_ran_is_what_ships(run: Path) -> None:
    rows = read_metrics(run)
    assert all(row["publish/proof_gap"] < 0.02 for row in rows)
    assert [row["weights/version"] for row in rows] == [1, 1, 2, 3, 4], "version 0 was rounded by nothing"
    assert rows[-1]["publish/rebuilds"] == 0
    assert sha256_of(run / "serving" / "model.safetensors") == sha256_of(run / "artifact" / "model.safetensors")


def test_the_calibration_is_in_the_checkpoint_and_comes_from_the_rollouts(run: Path) -> None:
    early, late = (load_state(run / "checkpoints" / f"step-00000{step}").calibration for step in (2, 4))
    assert len(early) == len(late) == 32, "8 prompts x 4 samples are fewer than the 64 that are asked for"
    assert early != late


@pytest.mark.variant
def test_export_again_gives_the_same_weights(run: Path, tmp_path: Path) -> None:
    result = hetero_rl("export", run, "--out", "again", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sha256_of(tmp_path / "again" / "model.safetensors") == sha256_of(run / "artifact" / "model.safetensors")


def test_resume_equals_uninterrupted(run: Path, tmp_path: Path) -> None:
    assert_resumes_as_uninterrupted(run, tmp_path)


def test_the_artifact_verifies_and_a_run_is_evaluated(run: Path, tmp_path: Path) -> None:
    verified = hetero_rl("verify-deploy", run / "artifact", "--json", "v.json", cwd=tmp_path)
    assert verified.returncode == 0, (tmp_path / "v.json").read_text()
    evaluated = hetero_rl("eval", run, "--json", "e.json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert numbers["eval/deployed_accuracy"] == read_metrics(run)[-1]["eval/deployed_accuracy"]
