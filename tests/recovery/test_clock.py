"""A clock that jumps by hours in either direction while a run goes on: durations are measured by another one, and nothing depends on it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hetero_rl.metrics import read_metrics
from tests.command_line import environment_of
from tests.recovery.conftest import LONGEST_RUN_S, Undisturbed, finished, is_undisturbed, start, train

pytestmark = pytest.mark.timeout(1800)
JUMPY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
/* The wall clock of whatever runs under LD_PRELOAD: three hours ahead in one half second, three behind in the next. */
static int (*real)(clockid_t, struct timespec *);
static long offset(void) {
    struct timespec now;
    real(CLOCK_MONOTONIC, &now);
    return (now.tv_nsec < 500000000L ? 1 : -1) * 3 * 3600L;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def jumpy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that LD_PRELOAD puts before the system's."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "jumpy.c").write_text(JUMPY.replace("#define _GNU_SOURCE\n", "#define _GNU_SOURCE 1\n"))
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", "jumpy.so", "jumpy.c", "-ldl"], cwd=folder, check=True, timeout=120)
    return str(folder / "jumpy.so")


def test_the_clock_jumps_at_all(jumpy: str) -> None:
    look = (
        "import time\nseen = []\nend = time.monotonic() + 1.5\n"
        "while time.monotonic() < end:\n    seen.append(time.time())\n    time.sleep(.05)\n"
        "assert max(seen) - min(seen) > 6 * 3600 - 9, seen"
    )
    subprocess.run([sys.executable, "-c", look], env=environment_of({"LD_PRELOAD": jumpy}), check=True, timeout=60)


@pytest.mark.fault("the wall clock jumps by six hours, twice a second, for trainer and engine")
def test_a_run_does_not_notice(undisturbed: Undisturbed, jumpy: str, tmp_path: Path) -> None:
    profile = tmp_path / "own.toml"
    profile.write_text('name = "own"\ndescription = "a process of its own"\nextends = "int4-onnx"\nengine.process = "own"\n')
    begin = time.monotonic()
    process = start(tmp_path, train(profile), LD_PRELOAD=jumpy)
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 0, out
    assert is_undisturbed(tmp_path / "run", undisturbed)
    rows = read_metrics(tmp_path / "run")
    assert all(0 <= row["perf/step_s"] <= time.monotonic() - begin for row in rows[1:])
    assert finished(tmp_path / "run").rows[-1]["step"] == 4
