"""A Ray cluster of one node on this machine, that ends with all it started; a token keeps everybody else out."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.command_line import environment_of
from tests.ports import free_port


@dataclass(frozen=True, slots=True)
class RayCluster:
    """`environment`: what a command needs to reach it; `head`: the process that everything on it descends from."""

    address: str
    environment: dict[str, str]
    head: psutil.Process

    def actors(self, name: str) -> list[psutil.Process]:
        """Worker processes of the actor class `name`."""
        return [process for process in self.head.children(recursive=True) if f"ray::{name}" in " ".join(_command(process))]


@contextmanager
def ray_cluster(num_cpus: int) -> Iterator[RayCluster]:
    """Run one with room for `num_cpus`, without dashboard or usage reports."""
    # Paths of sockets are short, and pytest's folders are not.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray would end a rank where other programs of this machine take its memory.
    environment["RAY_memory_monitor_refresh_ms"] = "0"
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port=0", f"--num-cpus={num_cpus}",
        f"--ray-client-server-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000",
        f"--temp-dir={folder}",
    ]  # fmt: skip
    with open(folder / "head.log", "w+", encoding="utf-8") as log:
        head = subprocess.Popen(command, env=environment_of(environment), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        family: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in (folder / "head.log").read_text("utf-8"):
                assert head.poll() is None, (folder / "head.log").read_text("utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.2)
            address = re.search(r"--address='(\S+)'", (folder / "head.log").read_text("utf-8"))
            assert address is not None
            yield RayCluster(address[1], {**environment, "RAY_ADDRESS": address[1]}, psutil.Process(head.pid))
        finally:
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(30)
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)
            shutil.rmtree(folder, ignore_errors=True)


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.cmdline()
    return []
