"""A run on a pool of engines: what fails on the way costs no rollout, and the metrics are those of a run that nothing disturbed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from hetero_rl.metrics import METRICS, read_metrics
from tests.agents import agent_process, kill_group, until_it_listens
from tests.command_line import SHORT_RUN, at_step, environment_of, hetero_rl, with_settings
from tests.ports import free_port
from tests.wire import Wire

NUM_STEPS = 12
TRAIN = ("train", "--target", "int4-onnx", *with_settings(*SHORT_RUN, f"loop.num_steps={NUM_STEPS}", "learner.zero_stage=0"))
POOL = "[[engines]]\ncount = 3\n[pool]\nrestart_after_s = 0.2\n"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of three engines that all live."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "pool.toml").write_text(POOL)
    result = hetero_rl(*TRAIN, "--config", "pool.toml", "--run-dir", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    rows = exact(folder / "run")
    assert len(rows) == NUM_STEPS + 1
    return rows


def exact(run: Path) -> list[dict[str, float]]:
    """What follows from config and seed; who served it does not."""
    return [{name: value for name, value in row.items() if METRICS[name].exact} for row in read_metrics(run)]


@pytest.mark.fault("of three engines one killed, one stopped")
def test_engines_that_are_killed_or_hang_cost_nothing(undisturbed: list[dict[str, float]], tmp_path: Path) -> None:
    (tmp_path / "pool.toml").write_text(POOL + "deadline_s = 8\n")
    process = start(tmp_path)
    try:
        at_step(tmp_path / "run", 3, process)
        engines_of(process)[0].kill()
        at_step(tmp_path / "run", 6, process)
        engines_of(process)[1].suspend()
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, out
    assert exact(tmp_path / "run") == undisturbed
    assert "died during" in out
    assert "did not answer" in out
    assert "is back" in out
    assert read_metrics(tmp_path / "run")[-1]["engines/restarts"] >= 1


@pytest.mark.fault("of two agents one killed, one cut off amid its work")
def test_agents_elsewhere_may_die_or_be_cut_off(undisturbed: list[dict[str, float]], tmp_path: Path) -> None:
    """Two machines and this one: the first is switched off, the network to the second breaks; three places draw what three places draw."""
    ports = free_port(), free_port()
    with ExitStack() as stack:
        agents = [agent_process("int4-onnx", tmp_path, port) for port in ports]
        for agent, port in zip(agents, ports, strict=True):
            stack.callback(kill_group, agent)
            until_it_listens(port, agent)
        wire = stack.enter_context(Wire(ports[1]))
        entries = "".join(f'[[engines]]\nurl = "http://127.0.0.1:{port}"\ntoken_file = "token"\n' for port in (ports[0], wire.port))
        (tmp_path / "pool.toml").write_text(f"{entries}[[engines]]\n[pool]\nrestart_after_s = 0.2\n")
        process = start(tmp_path)
        stack.callback(process.kill)
        at_step(tmp_path / "run", 3, process)
        kill_group(agents[0])
        at_step(tmp_path / "run", 6, process)
        wire.cut()
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert exact(tmp_path / "run") == undisturbed
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["step"], last["engines/serving"]) == (NUM_STEPS, 1)
    for port in (ports[0], wire.port):
        assert f"engine http://127.0.0.1:{port} is out" in out


@pytest.mark.fault("resume with another number of engines")
def test_a_resume_may_have_another_number_of_engines(tmp_path: Path) -> None:
    for count in (2, 1):
        (tmp_path / f"{count}.toml").write_text(f"[[engines]]\ncount = {count}\n")
    settings = with_settings("loop.num_steps=2", "checkpoint.every_steps=1")
    begun = hetero_rl(*TRAIN, *settings, "--config", "2.toml", "--run-dir", "run", cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    rows = exact(tmp_path / "run")
    more = with_settings("loop.num_steps=3")
    resumed = hetero_rl("train", "--resume", "--run-dir", "run", "--config", "1.toml", *more, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert exact(tmp_path / "run")[:2] == rows[:2]
    assert [row["engines/serving"] for row in read_metrics(tmp_path / "run")[1:]] == [2, 2, 1]


def start(folder: Path) -> subprocess.Popen[str]:
    """A run whose engines are those of pool.toml."""
    command = [sys.executable, "-m", "hetero_rl", *TRAIN, "--config", "pool.toml", "--run-dir", "run"]
    return subprocess.Popen(command, cwd=folder, env=environment_of({}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def engines_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The engine processes of a run, oldest first."""
    children = psutil.Process(process.pid).children(recursive=True)
    return sorted((child for child in children if "deploy_targets.engines.process" in child.cmdline()), key=psutil.Process.create_time)
