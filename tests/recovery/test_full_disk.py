"""A disk that is full: one clear error, the last checkpoint whole, and the run goes on once there is room."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import environment_of
from tests.recovery.conftest import NUM_FAULTS, Undisturbed, is_undisturbed, train

SCRIPT = """
set -e
mkdir disk
mount -t tmpfs -o size=$1 tmpfs disk
cd disk
python=$2; shift 2
if "$python" -m hetero_rl "$@" > out 2>&1; then echo "the disk was never full" >&2; exit 99; fi
cat out >&2
rm out
mount -o remount,size=1g "$PWD"
test -f run/config.json && set -- train --resume --run-dir run
"$python" -m hetero_rl "$@" >&2
cp -r run ../kept
"""
"""Arguments: size of the disk, interpreter, command. In a mount namespace of its own, so that nothing is left mounted."""
CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
SIZES = [60] if NUM_FAULTS < 10 else [1, 4, 10, 20, 30, 40, 50, 60, 70, 80]
"""MiB; a checkpoint of the demo model takes about 25."""


@pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace of its own")
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk(undisturbed: Undisturbed, size: int, tmp_path: Path, survived: Callable[[str, int], None]) -> None:
    """Full at start-up, at the first checkpoint, at a later one, at the export."""
    command = ["unshare", "-rm", "bash", "-c", SCRIPT, "bash", f"{size}m", sys.executable, *train()]
    result = subprocess.run(command, cwd=tmp_path, env=environment_of({}), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert "No space left on device" in result.stderr, result.stderr
    assert is_undisturbed(tmp_path / "kept", undisturbed)
    shutil.rmtree(tmp_path / "kept")
    survived("disk full, at start-up, checkpoint or export", 1)
