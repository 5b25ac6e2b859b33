"""What serving costs: the memory of a process and its children, and the time to the first token."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy_targets.serving_cost import first_token_s, peak_memory_bytes

MEBI = 2**20


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_peak_memory_counts_living_children_and_what_was_given_back() -> None:
    before = peak_memory_bytes()
    assert before is not None
    code = "data = bytearray(b'x') * (200 * 2**20); del data; print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with_child = peak_memory_bytes()
        child.communicate("\n")
    after = peak_memory_bytes()
    assert with_child is not None
    assert after is not None
    assert 200 * MEBI < with_child - before < 300 * MEBI
    assert after < before + 100 * MEBI


def status(folder: Path, pid: int, parent: int, peak_kib: int | None) -> None:
    (folder / str(pid)).mkdir()
    peak = "" if peak_kib is None else f"VmHWM:\t{peak_kib} kB\n"
    (folder / str(pid) / "status").write_text(f"Name:\tpython\nPPid:\t{parent}\n{peak}Threads:\t2\n")


def test_peaks_of_all_descendants_are_added(tmp_path: Path) -> None:
    me = os.getpid()
    for pid, parent, peak in ((me, 1, 100), (me + 1, me, 20), (me + 2, me + 1, 3), (me + 3, me, None), (me + 4, 1, 5000)):
        status(tmp_path, pid, parent, peak)
    assert peak_memory_bytes(tmp_path) == 123 * 1024


def test_without_proc_nothing_is_claimed(tmp_path: Path) -> None:
    assert peak_memory_bytes(tmp_path) is None


class SlowToStart:
    """Takes long for a prompt that it sees for the first time of all."""

    weight_version = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, int]] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Any) -> list[Any]:
        time.sleep(0.5 if not self.calls else 0.01)
        self.calls.append((list(prompts), sampling.max_tokens))
        return []


def test_the_first_token_is_timed_after_a_warm_up_on_other_prompts() -> None:
    engine = SlowToStart()
    assert 0.01 <= first_token_s(engine, [[1], [2], [3], [4], [5]], ()) < 0.2  # type: ignore[arg-type]
    assert engine.calls == [([[1]], 1), ([[2]], 1), ([[3]], 1), ([[4]], 1)]


def test_a_single_prompt_is_timed_itself() -> None:
    engine = SlowToStart()
    first_token_s(engine, [[1]], ())  # type: ignore[arg-type]
    assert engine.calls == [([[1]], 1), ([[1]], 1)]
