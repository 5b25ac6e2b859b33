"""A disk that is full: one clear error, the last checkpoint whole, and the run goes on once there is room."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import environment_of, with_settings
from tests.recovery.conftest import LONGEST_RUN_S, NUM_FAULTS, Undisturbed, faults, is_undisturbed, train, undisturbed_run

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
        reason="needs a mount namespace of its own",
    ),
]
SCRIPT = """
set -e
mkdir disk
mount -t tmpfs -o size=$1 tmpfs disk
cd disk
python=$2 until=$3; shift 3
"$python" -m hetero_rl "$@" > ../out 2>&1 &
run=$!
if [ -n "$until" ]; then
    # Until it holds, there is room; then there is none.
    while kill -0 $run 2> ../log && ! eval "$until"; do sleep 0.05; done
    head -c 4G /dev/zero > filling 2> ../log || true
fi
if wait $run; then cat ../out >&2; echo "the disk was never full" >&2; exit 99; fi
cat ../out >&2
rm -f filling
mount -o remount,size=1g "$PWD"
test -f run/config.json && set -- train --resume --run-dir run
"$python" -m hetero_rl "$@" >&2
cp -r run ../kept
"""
"""Arguments: size of the disk, interpreter, condition, command. In a mount namespace of its own, so that nothing is left mounted."""
SIZES = [60] if NUM_FAULTS < 10 else [1, 4, 10, 20, 30, 40, 50, 60, 66, 72]
"""MiB; a checkpoint of the demo model takes about 25."""


def fails_and_goes_on(folder: Path, size_mib: int, until: str, command: list[str], expected: Undisturbed) -> str:
    """What the run on the full disk and its resume say; its outcome is the expected one."""
    script = ["unshare", "-rm", "bash", "-c", SCRIPT, "bash", f"{size_mib}m", sys.executable, until, *command]
    result = subprocess.run(
        script, cwd=folder, env=environment_of({}), capture_output=True, text=True, timeout=2 * LONGEST_RUN_S, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert "No space left on device" in result.stderr, result.stderr
    assert is_undisturbed(folder / "kept", expected)
    shutil.rmtree(folder / "kept")
    return result.stderr


@pytest.mark.fault("disk too small: full at start-up, at the first checkpoint, at a later one")
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk(undisturbed: Undisturbed, size: int, tmp_path: Path) -> None:
    fails_and_goes_on(tmp_path, size, "", train(), undisturbed)


WHEN = {
    "checkpoint": "compgen -G 'run/checkpoints/step-000002.partial' > ../log",
    "export": "test -d run/artifact.partial",
}


@pytest.mark.parametrize("what", faults(["export"] if NUM_FAULTS < 10 else WHEN, "disk full amid the {}"))
def test_it_fills_up_amid_what_is_written(what: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    fails_and_goes_on(tmp_path, 200, WHEN[what], train(), undisturbed)


@pytest.mark.variant
@pytest.mark.fault("disk full amid the metrics")
def test_it_fills_up_where_only_metrics_are_written(tmp_path: Path) -> None:
    """Without publishes and checkpoints in between; some 20 rows, so that the last page of the file has no room for what comes."""
    command = [
        *train(),
        *with_settings("loop.num_steps=20", "loop.publish_every=20", "checkpoint.every_steps=20", "evaluation.every_steps=20"),
    ]
    (tmp_path / "undisturbed").mkdir()
    expected = undisturbed_run(tmp_path / "undisturbed", *command)
    said = fails_and_goes_on(tmp_path, 200, "test -f run/metrics.jsonl && test $(wc -l < run/metrics.jsonl) -gt 2", command, expected)
    assert "No space left on device: run. Make room, then go on with: hetero-rl train --resume --run-dir run" in said, said
