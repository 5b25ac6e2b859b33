"""Bytes that an update of an engine elsewhere takes: the difference to the last version (deltas.py) and the whole file, both compressed.

The demo's own training steps, one publish after each; the engine that samples is on this machine, and what would be sent is counted.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import Measurement, arguments, measurement, write
from deploy_targets.deltas import packed

ROOT = Path(__file__).parents[1]
TARGETS = ("int4-onnx", "q4_k_m-llamacpp", "bf16-transformers")


def update_bytes(target: str, num_steps: int) -> tuple[list[int], list[int], int]:
    """Of each update: bytes of the difference, bytes of the whole; and the length of the file."""
    import torch
    from rich.console import Console

    from deploy_targets.weights_file import WEIGHTS_FILES
    from hetero_rl.algorithm.advantage import advantages
    from hetero_rl.config import load_config
    from hetero_rl.floor import measure_start
    from hetero_rl.parts import assemble
    from hetero_rl.rollout import collect, train_sequences
    from hetero_rl.view import View

    config, profile = load_config([ROOT / "configs" / "demo.toml"], [], target)
    deltas, wholes = [], []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parts = assemble(config, profile, folder / "serving", View(Console(quiet=True)), stack)
        state, learner, publisher = measure_start(config, parts), parts.learner, parts.publisher
        weights = next(publisher.folder / name for name in WEIGHTS_FILES if (publisher.folder / name).is_file())
        for step in range(num_steps):
            shutil.copyfile(weights, folder / "last")
            rollouts = collect(publisher.engine, parts.task, parts.sampling, config.loop, step, lambda name: None)
            advantage = advantages(config.algorithm.advantage, torch.from_numpy(rollouts.rewards))
            learner.update(train_sequences(rollouts, advantage.numpy()), state.dual.multiplier)
            publisher.publish(step + 1, rollouts.sequences)
            deltas.append(sum(map(len, packed(weights, folder / "last"))))
            wholes.append(sum(map(len, packed(weights, None))))
            print(f"  {target}, step {step + 1} of {num_steps}: {deltas[-1]} of {wholes[-1]} bytes", file=sys.stderr, flush=True)
        return deltas, wholes, weights.stat().st_size


def main() -> int:
    options = arguments("delta_updates", __doc__, rounds=50, targets=TARGETS)
    targets = options.targets or (TARGETS[:1] if options.quick else TARGETS)
    cases: dict[str, Measurement] = {}
    for target in targets:
        deltas, wholes, size = update_bytes(target, options.rounds)
        cases[target] = measurement(deltas, "bytes", baseline=wholes, ratio_of="difference / whole file, compressed", file_bytes=size)
    write(options, cases, targets[0], {"num_steps": options.rounds, "config": "configs/demo.toml"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
