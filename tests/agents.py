"""Target agents for tests: the real service on a free port of the loopback, in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from deploy_targets.agent.host import Host
from deploy_targets.agent.service import make_app
from deploy_targets.profile import TargetProfile
from tests.command_line import environment_of
from tests.ports import free_port

TOKEN = "token-of-the-tests-0123456789"


@dataclass
class Agent:
    """A service that runs in this process."""

    url: str
    host: Host


@contextmanager
def running_agent(
    profile: TargetProfile, folder: Path, max_file_bytes: int = 1 << 26, certificate: tuple[Path, Path] | None = None
) -> Iterator[Agent]:
    """An agent in a thread; `certificate`: (certificate, key) of TLS."""
    host, port = Host(profile, folder, max_file_bytes), free_port()
    cert, key = certificate or (None, None)
    app = make_app(host, TOKEN, max_file_bytes)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="critical", ssl_certfile=cert, ssl_keyfile=key))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Agent(f"{'https' if certificate else 'http'}://127.0.0.1:{port}", host)
    finally:
        server.should_exit = True
        thread.join(30)


def agent_process(target: str, folder: Path, port: int) -> subprocess.Popen[str]:
    """`hetero-rl target-agent` itself."""
    token_file = folder / "token"
    if not token_file.exists():
        token_file.touch(0o600)
        token_file.write_text(TOKEN)
    command = [
        sys.executable,
        "-m",
        "hetero_rl",
        "target-agent",
        "--target",
        target,
        "--bind",
        f"127.0.0.1:{port}",
        "--token-file",
        "token",
    ]
    return subprocess.Popen(
        command, cwd=folder, env=environment_of({}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )


def until_it_listens(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.communicate()[0]
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process and what it started in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
