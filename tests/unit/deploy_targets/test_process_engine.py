"""An engine in a process of its own: the same answers, the same errors, and nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy_targets.catalog import make_quantizer, open_engine_here
from deploy_targets.engines.environment import child_environment, num_usable_cores
from deploy_targets.engines.process import ProcessEngine
from deploy_targets.errors import ArtifactError, EngineError, ProfileError, UnknownNameError, UsageError
from deploy_targets.profile import EngineSpec, TargetProfile, load_profile
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from tests.conftest import TinyModels
from tests.plugins import lay_out, python_path

PROMPTS = [[5, 6, 7], [8], [8], [30, 29]]
SEQUENCES = [TokenSequence((5, 6, 7, 8), 1), TokenSequence((9, 10, 11), 2)]


def fake_profile(engine: str = "fake", **options: Any) -> TargetProfile:
    spec = EngineSpec(name=engine, process="own", options=options)
    return load_profile("fake").model_copy(update={"engine": spec})


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tiny_models("qwen3")
    made = tmp_path_factory.mktemp("artifact")
    (made / WEIGHTS_FILE).write_bytes((model_dir / WEIGHTS_FILE).read_bytes())
    make_quantizer(fake_profile(), model_dir).scaffold(model_dir, made)
    return made


@pytest.fixture
def engine(folder: Path) -> Iterator[ProcessEngine]:
    opened = ProcessEngine(fake_profile(nan_logps=0.2, fail_updates=1), folder, 3)
    yield opened
    opened.close()


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie waiting for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_answers_are_bit_for_bit_those_of_the_engine_itself(engine: ProcessEngine, folder: Path) -> None:
    here = open_engine_here(fake_profile(nan_logps=0.2), folder, 3)
    for sampling in (Sampling(6, 0.7, 11, (4, 9)), Sampling(1, 0.0)):
        for ours, theirs in zip(engine.generate(PROMPTS, sampling), here.generate(PROMPTS, sampling), strict=True):
            assert ours.prompt == theirs.prompt
            assert ours.tokens.dtype == np.int32
            assert ours.logps.dtype == np.float32
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.logps, theirs.logps)  # NaN equals NaN here
            assert (ours.weight_version, ours.temperature, ours.finish_reason) == (3, theirs.temperature, theirs.finish_reason)
    for score, other in zip(engine.score(SEQUENCES, 1.3), here.score(SEQUENCES, 1.3), strict=True):
        np.testing.assert_array_equal(score.logps, other.logps)
        np.testing.assert_array_equal(score.greedy_tokens, other.greedy_tokens)
        assert (score.weight_version, score.temperature) == (3, 1.3)
    assert engine.generate([], Sampling(4)) == []
    assert engine.score([]) == []


def test_errors_arrive_as_what_they_are_and_the_engine_lives_on(engine: ProcessEngine, folder: Path) -> None:
    with pytest.raises(UsageError, match="outside"):
        engine.generate([[36]], Sampling(1))
    with pytest.raises(EngineError, match="fail_updates") as caught:
        engine.update(WeightFile(folder / WEIGHTS_FILE, 4))
    assert "last lines" in str(caught.value)
    assert engine.weight_version == 3
    assert engine.update(WeightFile(folder / WEIGHTS_FILE, 4)) == engine.weight_version == 4


def test_an_engine_that_does_not_start_raises_its_own_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="nan_share") as caught:
        ProcessEngine(fake_profile(nan_share=1, stale="perhaps"), folder, 1)
    assert len(caught.value.offenders) == 2
    with pytest.raises(UnknownNameError, match="Did you mean 'fake'"):
        ProcessEngine(fake_profile("fakes"), folder, 1)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        ProcessEngine(fake_profile(), tmp_path, 1)


def test_a_process_that_cannot_be_started_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", no_memory)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EngineError, match=r"cannot be started: .*Cannot allocate memory"):
        ProcessEngine(fake_profile(), folder, 1)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_long_log_is_read_at_its_end_alone(engine: ProcessEngine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole of 64 GiB takes no place on the disk, and no memory unless it is read."""
    with open(engine._log, "r+b") as log:
        log.seek(64 << 30)
        log.write("\n".join(f"line {number} \u00e4" for number in range(20_000)).encode())
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **options: pytest.fail("reads the whole log"))
    lines = engine._log_tail().splitlines()
    assert len(lines) == 17
    assert lines[-1].strip() == "line 19999 \u00e4"


@pytest.mark.parametrize(
    ("end", "said"),
    [("os._exit(7)", "exit code 7"), ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"), ("os.abort()", "killed by SIGABRT")],
)
def test_an_engine_that_dies_while_loading_shows_its_last_lines(
    end: str, said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"""
import os, signal

class Dying:
    def __init__(self, artifact_dir, options, weight_version):
        for number in range(100):
            print("reading tensor", number, flush=True)
        {end}
"""
    site = lay_out(tmp_path, "dying", {"dying.py": module}, engines="dying = dying:Dying")
    monkeypatch.setenv("PYTHONPATH", python_path(site))
    with pytest.raises(EngineError, match=rf"died during 'start' \({said}\)") as caught:
        ProcessEngine(fake_profile("dying"), folder, 1)
    shown = str(caught.value).partition("Its last lines:")[2].split("\n  ")[1:]
    assert shown[-3:] == ["reading tensor 97", "reading tensor 98", "reading tensor 99"]
    assert 3 <= len(shown) < 30


def test_a_killed_engine_is_an_error_that_says_so(engine: ProcessEngine) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="killed by SIGKILL"):
        engine.generate(PROMPTS, Sampling(2))
    with pytest.raises(EngineError, match="closed"):
        engine.generate(PROMPTS, Sampling(2))


@pytest.mark.fault("engine hangs past its deadline")
def test_a_call_that_takes_too_long_ends_the_engine(folder: Path) -> None:
    engine = ProcessEngine(fake_profile(), folder, 1, call_timeout_s=0.05)
    with pytest.raises(EngineError, match=r"within 0\.05 s"):
        engine.generate([[5]] * 2000, Sampling(500))
    assert not is_running(engine.pid)


def test_interrupts_of_the_terminal_do_not_reach_the_engine(engine: ProcessEngine) -> None:
    os.kill(engine.pid, signal.SIGINT)
    assert len(engine.generate(PROMPTS, Sampling(2))) == len(PROMPTS)


def test_closing_ends_the_process_and_twice_is_harmless(engine: ProcessEngine) -> None:
    assert is_running(engine.pid)
    started = time.monotonic()
    engine.close()
    assert not is_running(engine.pid)
    assert time.monotonic() - started < 6
    engine.close()


PARENT = """
import os, signal, sys
from pathlib import Path
from deploy_targets.engines.process import ProcessEngine
from deploy_targets.profile import TargetProfile
engine = ProcessEngine(TargetProfile.model_validate_json(sys.argv[1]), Path(sys.argv[2]), 1)
sys.stdout.write(str(engine.pid))
sys.stdout.flush()
if sys.argv[3] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "raises":
    raise SystemExit("on purpose")
"""


@pytest.mark.parametrize("end", ["killed", "raises", "returns"])
def test_the_engine_ends_with_its_parent(end: str, folder: Path) -> None:
    arguments = [sys.executable, "-c", PARENT, fake_profile().model_dump_json(), str(folder), end]
    parent = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert parent.returncode == {"killed": -signal.SIGKILL, "raises": 1, "returns": 0}[end], parent.stderr
    assert wait_until_gone(int(parent.stdout), seconds=15)


def test_the_environment_of_the_engine() -> None:
    launcher = {"RANK": "1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    user = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "active", "VLLM_LOGGING_LEVEL": "DEBUG"}
    made = child_environment(load_profile("int4-vllm"), {**launcher, **user})
    assert {key: made[key] for key in user} == user
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(made)
    assert made["OMP_NUM_THREADS"] == str(num_usable_cores())
    assert made["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert child_environment(fake_profile(num_threads=3), {})["OMP_NUM_THREADS"] == "3"
    assert child_environment(fake_profile(), {})["OMP_WAIT_POLICY"] == "passive"


def test_vllm_gets_an_openmp_that_yields_where_there_is_one() -> None:
    made = child_environment(load_profile("int4-vllm"), {"LD_PRELOAD": "/lib/libother.so"})
    library, _, kept = made["LD_PRELOAD"].rpartition(":")
    assert kept == "/lib/libother.so"
    if library:
        assert Path(library).is_file()
        assert made["KMP_BLOCKTIME"] == "1"
        assert "OMP_WAIT_POLICY" not in made
    else:
        assert made["OMP_WAIT_POLICY"] == "passive"
    chosen = child_environment(load_profile("int4-vllm"), {"LD_PRELOAD": "/lib/libgomp.so.1"})
    assert (chosen["LD_PRELOAD"], chosen["OMP_WAIT_POLICY"]) == ("/lib/libgomp.so.1", "passive")
