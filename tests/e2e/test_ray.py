"""Ranks and engines on a Ray cluster of this machine: the run is that of one process; who dies there is said in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, at_step, environment_of, fails, hetero_rl, with_settings
from tests.ray_cluster import RayCluster, ray_cluster

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
ON_RAY = '[learner]\nlauncher = "ray"\nnum_ranks = 2\nzero_stage = 3\n[[engines]]\nplacement = "ray"\n'
NUM_STEPS = 6
TRAIN = ("train", "--config", "ray.toml", *with_settings(*SHORT_RUN, f"loop.num_steps={NUM_STEPS}"))
EQUAL = ("constraint/floor", "constraint/tolerance", "reward/mean", "constraint/engine_gap", "constraint/lambda", "learner/grad_norm")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(num_cpus=3) as found:
        yield found


@pytest.mark.slow
def test_a_run_on_ray_is_that_of_one_rank_and_survives_the_death_of_each_part(cluster: RayCluster, tmp_path: Path) -> None:
    """Two ranks under ZeRO 3 and an engine. The engine dies: another takes its place; a rank dies: the run ends, --resume goes on."""
    (tmp_path / "ray.toml").write_text(ON_RAY + "[pool]\nrestart_after_s = 0.2\nmin_engines = 1\n[[engines]]\n")
    (tmp_path / "one.toml").write_text("[learner]\nzero_stage = 3\n[[engines]]\ncount = 2\n")
    environment = {**cluster.environment, **ONE_THREAD}
    process = subprocess.Popen(
        [sys.executable, "-m", "hetero_rl", *TRAIN, "--run-dir", "two"], cwd=tmp_path, env=environment_of(environment),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        at_step(tmp_path / "two", 1, process)
        [holder] = cluster.actors("_Holder")
        holder.kill()
        at_step(tmp_path / "two", 4, process)
        [rank] = cluster.actors("_Rank")
        rank.kill()
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, out
    assert "engine ray 1 is out: engine 'onnxruntime' on Ray died during" in out
    assert "rank 1 on Ray ended" in out, out
    assert "Traceback" not in out
    resumed = hetero_rl("train", "--resume", "--run-dir", "two", cwd=tmp_path, **environment)
    assert resumed.returncode == 0, resumed.stderr
    alone = hetero_rl("train", "--config", "one.toml", *TRAIN[3:], "--run-dir", "one", cwd=tmp_path, **ONE_THREAD)
    assert alone.returncode == 0, alone.stderr
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == NUM_STEPS + 1
    # The first update sees the same weights; later ones, weights that were rounded to bf16 in between.
    for name in EQUAL:
        assert two[1].get(name) == pytest.approx(one[1].get(name), rel=1e-2), name
    assert not cluster.actors("_Rank")
    assert not cluster.actors("_Holder")


def test_what_the_cluster_cannot_do_is_said_before_anything_is_made(cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "ray.toml").write_text(ON_RAY)
    result = hetero_rl(*TRAIN, *with_settings("learner.num_ranks=9"), cwd=tmp_path, **cluster.environment)
    fails(result, 2, "the Ray cluster has 3 CPUs", "9 ranks of 1", "want 10")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "environment", "fragments"),
    [
        (['ray.address="127.0.0.1:9"'], {}, ("no Ray cluster at ray.address", "127.0.0.1:9")),
        (["ray.address=ray://head:10001"], {}, ("is for Ray's client",)),
        (["ray.address=head"], {}, ("is not of the form host:port",)),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, ("starts the ranks itself",)),
    ],
)
def test_no_cluster(settings: list[str], environment: dict[str, str], fragments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "ray.toml").write_text(ON_RAY)
    fails(hetero_rl(*TRAIN, *with_settings(*settings), cwd=tmp_path, **environment), 2, *fragments)
    assert not (tmp_path / "runs").exists()


def test_without_the_package(tmp_path: Path) -> None:
    """The same command where Ray is not installed: find_spec sees no package of that name."""
    (tmp_path / "ray.toml").write_text(ON_RAY)
    code = f"import sys; sys.modules['ray'] = None; sys.argv = ['hetero-rl', *{json.dumps(TRAIN)}]; from hetero_rl.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment_of({}), capture_output=True, text=True, check=False)
    fails(done, 2, "needs the package 'ray'", "hetero-rl[ray]")
