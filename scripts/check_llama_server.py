"""Does a running `llama-server` give the log-probs that the engine in this process gives? It is a program of its own, so this runs by hand.

    .venv/bin/python scripts/check_llama_server.py path/to/llama-server ARTIFACT

Starts the program on the artifact's GGUF file, scores golden probes and generates on the task sample both ways, and exits with 1 where
a log-prob differs by more than `MOST_NATS`.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from deploy_targets.artifact import PROBES_FILE, TASK_SAMPLE_FILE, check_artifact
from deploy_targets.catalog import open_engine
from deploy_targets.engines.server import ServerEngine
from deploy_targets.errors import EngineError
from deploy_targets.gguf_file import GGUF_FILE
from deploy_targets.probes import read_probes
from deploy_targets.protocols import Engine
from deploy_targets.types import Sampling, TokenSequence
from deploy_targets.verify import read_task_sample

MOST_NATS = 0.05
"""llama.cpp rounds activations to int8 and caches keys and values in float16: how it splits a batch moves single values by a step."""
NUM_PROBES, NUM_PROMPTS = 32, 32


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_server", type=Path)
    parser.add_argument("artifact", type=Path)
    arguments = parser.parse_args()
    manifest = check_artifact(arguments.artifact)
    sequences = [probe.sequence for probe in read_probes(arguments.artifact / PROBES_FILE).probes[:NUM_PROBES]]
    prompts = [row["prompt_tokens"] for row in read_task_sample(arguments.artifact / TASK_SAMPLE_FILE)[:NUM_PROMPTS]]
    greedy = Sampling(manifest.sampling.max_tokens, 0.0, stop_token_ids=manifest.sampling.stop_token_ids)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [arguments.llama_server, "-m", arguments.artifact / GGUF_FILE, "--host", "127.0.0.1", "--port", port, "-c", 4096]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asked = waited_for(f"http://127.0.0.1:{port}", arguments.artifact, manifest.weight_version, manifest.profile.max_model_len)
        sys.stdout.write(f"{asked.server}\n")
        their_logps, their_greedy, their_tokens = answers(asked, sequences, prompts, greedy)
        asked.close()
    finally:
        server.terminate()
        server.wait()
    engine = open_engine(manifest.profile, arguments.artifact, manifest.weight_version)
    logps, top, tokens = answers(engine, sequences, prompts, greedy)
    engine.close()
    gap = np.abs(their_logps - logps)
    same = sum(one == other for one, other in zip(their_tokens, tokens, strict=True))
    sys.stdout.write(
        f"{len(gap)} tokens: log-probs differ by {np.nanmean(gap):.2g} nats in the mean, {np.nanmax(gap):.2g} at most, "
        f"{np.isnan(their_logps).sum()} have none; {np.mean(their_greedy == top):.1%} have the same most probable token; "
        f"{same} of {len(tokens)} greedy responses are equal\n"
    )
    return int(not np.nanmax(gap) <= MOST_NATS)


def waited_for(url: str, artifact: Path, weight_version: int, max_model_len: int) -> ServerEngine:
    """The server, once it has loaded its file."""
    for _ in range(120):
        try:
            return ServerEngine(url, artifact, weight_version, max_model_len=max_model_len)
        except EngineError:
            time.sleep(1)
    return ServerEngine(url, artifact, weight_version, max_model_len=max_model_len)


def answers(
    engine: Engine, sequences: list[TokenSequence], prompts: list[list[int]], greedy: Sampling
) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Log-probs and most probable tokens of all probes, one after the other, and the responses to `prompts`."""
    scores = engine.score(sequences)
    responses = [generation.tokens.tolist() for generation in engine.generate(prompts, greedy)]
    return np.concatenate([score.logps for score in scores]), np.concatenate([score.greedy_tokens for score in scores]), responses


if __name__ == "__main__":
    sys.exit(main())
