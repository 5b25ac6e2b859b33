"""Two ranks of the learner do what one does: through torchrun and the deepspeed launcher, under every ZeRO stage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from deploy_targets.weights_file import sha256_of
from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, at_step, environment_of, hetero_rl, with_settings
from tests.conftest import TinyModels
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
LAUNCHED = {"OMP_NUM_THREADS": "1"}


def run_ranks(num_ranks: int, model: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    command = [*TORCHRUN, str(num_ranks), "-m", "tests.rank_script", str(model), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment_of(LAUNCHED), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads((out / "found.json").read_text()))


@pytest.fixture(scope="module")
def by_ranks(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder, model = tmp_path_factory.mktemp("ranks"), tiny_models("qwen3")
    return {
        num_ranks: run_ranks(num_ranks, model, folder / str(num_ranks)) | {"folder": str(folder / str(num_ranks))} for num_ranks in (1, 2)
    }


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_two_ranks_do_what_one_does(by_ranks: dict[int, dict[str, Any]], stage: str) -> None:
    agree(by_ranks[1][stage], by_ranks[2][stage])


@pytest.mark.variant
def test_four_ranks_do_what_one_does(by_ranks: dict[int, dict[str, Any]], tiny_models: TinyModels, tmp_path: Path) -> None:
    four = run_ranks(4, tiny_models("qwen3"), tmp_path / "4")
    for stage in ("0", "1", "2", "3"):
        agree(by_ranks[1][stage], four[stage])
        assert len({(tmp_path / "4" / f"lambdas-{stage}-{rank}").read_text() for rank in range(4)}) == 1


def agree(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The first update sees the same weights: what differs is the order of sums. Later ones start from weights rounded to bf16."""
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
    assert two["gaps"][0] == pytest.approx(one["gaps"][0], rel=1e-5)
    assert two["grad_norms"][0] == pytest.approx(one["grad_norms"][0], rel=1e-2)
    for name in ("losses", "gaps", "grad_norms"):
        assert two[name] == pytest.approx(one[name], rel=0.05), name
    assert two["lambdas"] == pytest.approx(one["lambdas"], rel=1e-3)
    np.testing.assert_allclose(two["scores"], one["scores"], atol=0.05)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-3)


@pytest.mark.parametrize("stage", ["0", "3"])
def test_lambda_is_the_same_bits_on_all_ranks(by_ranks: dict[int, dict[str, Any]], stage: str) -> None:
    folder = Path(by_ranks[2]["folder"])
    assert (folder / f"lambdas-{stage}-0").read_text() == (folder / f"lambdas-{stage}-1").read_text()


@pytest.mark.parametrize("stage", ["0", "3"])
def test_every_rank_rounds_by_the_same_calibration(by_ranks: dict[int, dict[str, Any]], stage: str) -> None:
    """The twin of a rank that has none would be that of rounding to nearest."""
    one, two = (by_ranks[num][f"calibrated-{stage}"] for num in (1, 2))
    moved = np.abs(np.subtract(one["calibrated"], one["nearest"])).max()
    assert moved > 0.01
    assert np.abs(np.subtract(two["calibrated"], one["calibrated"])).max() < moved / 10
    assert two["weights"] == pytest.approx(one["weights"])


def test_what_a_model_says_in_float32_is_the_same_from_spread_weights(by_ranks: dict[int, dict[str, Any]]) -> None:
    """DeepSpeed gathers bf16 weights in the middle of float32 arithmetic, and must find them as they were."""
    one, two = by_ranks[1]["described"], by_ranks[2]["described"]
    assert np.isfinite(one["first"]).all()
    assert two["again"] == two["first"]
    np.testing.assert_allclose(two["first"], one["first"], atol=1e-4)


def test_the_deepspeed_launcher_and_a_resume(tmp_path: Path) -> None:
    """ZeRO 3 on two ranks through the command line; stopped half-way, it goes on with two, and says why not with one.

    What needs the weights alone is one process's: an export of the same checkpoint gives the same bytes.
    """
    settings = with_settings(*SHORT_RUN, "learner.zero_stage=3")
    assert hetero_rl("train", *settings, "--run-dir", "one", cwd=tmp_path, **LAUNCHED).returncode == 0
    launch = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--module", "hetero_rl", "train"]

    def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launch, *arguments], cwd=tmp_path, env=environment_of(LAUNCHED), capture_output=True, text=True, timeout=300, check=False
        )

    done = launched(*settings, "--run-dir", "two")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 5
    for name in (
        "constraint/floor",
        "constraint/tolerance",
        "reward/mean",
        "constraint/engine_gap",
        "constraint/lambda",
        "learner/grad_norm",
    ):
        assert two[1].get(name) == pytest.approx(one[1].get(name), rel=1e-2), name
    again = hetero_rl("export", "two", "--out", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000004")
    shutil.move(tmp_path / "two" / "artifact", tmp_path / "artifact")
    assert sha256_of(tmp_path / "again" / "model.safetensors") == sha256_of(tmp_path / "artifact" / "model.safetensors")
    alone = hetero_rl("train", "--resume", "--run-dir", "two", cwd=tmp_path, **LAUNCHED)
    assert alone.returncode == 2
    assert "made by 2 ranks with learner.zero_stage = 3" in alone.stderr
    resumed = launched("--resume", "--run-dir", "two")
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    again = read_metrics(tmp_path / "two")
    assert [row["reward/mean"] for row in again[1:]] == [row["reward/mean"] for row in two[1:]]
    assert again[-1]["constraint/engine_gap"] == two[-1]["constraint/engine_gap"]


@pytest.mark.variant
def test_two_launchers_as_on_two_machines(tmp_path: Path) -> None:
    """`torchrun --nnodes 2`: each machine starts its own, in its own folder; the run folder lies where both see it."""
    settings = with_settings(*SHORT_RUN, "learner.zero_stage=2")
    assert hetero_rl("train", *settings, "--run-dir", "one", cwd=tmp_path, **LAUNCHED).returncode == 0
    port, processes = free_port(), []
    for node in ("0", "1"):
        (tmp_path / f"machine {node}").mkdir()
        where = ["--nnodes", "2", "--node_rank", node, "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "hetero_rl", "train", *settings]
        processes.append(
            subprocess.Popen(
                [*command, "--run-dir", tmp_path / "two"], cwd=tmp_path / f"machine {node}", env=environment_of(LAUNCHED),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 5
    for name in ("constraint/floor", "reward/mean", "constraint/engine_gap", "learner/grad_norm"):
        assert two[1].get(name) == pytest.approx(one[1].get(name), rel=1e-2), name


@pytest.mark.fault("SIGKILL of one rank of two")
def test_a_rank_that_is_killed_ends_the_run_and_a_resume_goes_on(tmp_path: Path) -> None:
    command = [*TORCHRUN, "2", "-m", "hetero_rl", "train"]
    settings = with_settings(*SHORT_RUN, "loop.num_steps=400", "checkpoint.every_steps=2")
    process = subprocess.Popen(
        [*command, *settings, "--run-dir", "run"], cwd=tmp_path, env=environment_of(LAUNCHED), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        at_step(tmp_path / "run", 3, process)
        ranks = [child for child in psutil.Process(process.pid).children() if "hetero_rl" in child.cmdline()]
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    resume = [*command, "--resume", "--run-dir", "run", *with_settings("loop.num_steps=6")]
    done = subprocess.run(resume, cwd=tmp_path, env=environment_of(LAUNCHED), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, out + done.stdout + done.stderr
    assert read_metrics(tmp_path / "run")[-1]["step"] >= 6
