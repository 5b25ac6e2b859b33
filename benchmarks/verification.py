"""How long a verdict takes from a cold start, and what replaying the probes costs on top of the engine's own scoring.

The demo's artifact, exported from the model as it is shipped. `cold_*`: `hetero-rl verify-deploy` as a process, imports and engine too;
`import`: a process that only imports what the command does before it looks at an artifact.
`scoring_*`: the probes through `verify`'s replay, with its looks and their intervals, and through one call of `engine.score`, in turns.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import Measurement, arguments, in_turns, measurement, write

TARGETS = ("int4-onnx", "q4_k_m-llamacpp", "int4-vllm")
IMPORTED = ("hetero_rl.commands", "deploy_targets.bundle", "deploy_targets.engines.server")
"""What `verify-deploy` imports before it looks at an artifact, and by the way to a server; tests/cli/test_light.py bounds it."""
SCORING_ROUNDS = 3
"""For each round of the others: one takes a fraction of a second."""
EXPORT = """
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from hetero_rl.config import load_config
from hetero_rl.export import export_artifact
from hetero_rl.floor import measure_start
from hetero_rl.parts import assemble
from hetero_rl.view import View

config, profile = load_config([], [], sys.argv[1])
with ExitStack() as stack:
    parts = assemble(config, profile, Path(sys.argv[2]) / "serving", View(Console(quiet=True)), stack)
    export_artifact(config, profile, parts, measure_start(config, parts), Path(sys.argv[2]) / "artifact")
"""


def import_seconds() -> float:
    """Start to exit of a process that imports the command and nothing else."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {', '.join(IMPORTED)}"], check=True)
    return time.perf_counter() - start


def cold_seconds(artifact: Path) -> float:
    """One `verify-deploy`, start to exit."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "hetero_rl", "verify-deploy", str(artifact)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - start


def scoring(artifact: Path, rounds: int) -> tuple[Measurement, int]:
    """Tokens per second through the replay, against the engine's own; and how many tokens a round has."""
    from deploy_targets.artifact import PROBES_FILE, check_artifact
    from deploy_targets.catalog import open_engine
    from deploy_targets.gates import judge_gap
    from deploy_targets.probes import read_probes
    from deploy_targets.sequential import LOOK_CONFIDENCE, fails_clearly, may_fail
    from deploy_targets.verify import measure_gap

    manifest = check_artifact(artifact)
    policy = read_probes(artifact / PROBES_FILE).of_kind("policy")
    gates, tolerance = manifest.profile.gates, manifest.tolerance
    engine = open_engine(manifest.profile, artifact, manifest.weight_version)
    sequences = [probe.sequence for probe in policy.probes]
    num_tokens = sum(len(probe.learner_logps) for probe in policy.probes)

    def replay() -> float:
        start = time.perf_counter()
        gap = measure_gap(
            engine, policy, lambda *_: None, full=False,
            is_clear=lambda gap: may_fail(judge_gap(gates, tolerance, gap, None))
            and fails_clearly(judge_gap(gates, tolerance, gap, LOOK_CONFIDENCE)),
        )  # fmt: skip
        assert len(gap.scored) == len(sequences), "the artifact is clean: nothing stops early"
        return num_tokens / (time.perf_counter() - start)

    def bare() -> float:
        start = time.perf_counter()
        engine.score(sequences, policy.temperature)
        return num_tokens / (time.perf_counter() - start)

    try:
        found = in_turns({"replay": replay, "bare": bare}, rounds)
    finally:
        engine.close()
    return measurement(found["replay"], "tokens/s", baseline=found["bare"], ratio_of="tokens/s of the replay / of one call"), num_tokens


def main() -> int:
    options = arguments("verification", __doc__, rounds=7, targets=TARGETS)
    cases: dict[str, Measurement] = {"import": measurement(in_turns({"import": import_seconds}, options.rounds)["import"], "s")}
    tokens = {}
    targets = options.targets or (TARGETS[:1] if options.quick else TARGETS)
    with ExitStack() as stack:
        for target in targets:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            subprocess.run([sys.executable, "-c", EXPORT, target, str(folder)], check=True, stdout=subprocess.DEVNULL)
            seconds = in_turns({"cold": lambda folder=folder: cold_seconds(folder / "artifact")}, options.rounds)["cold"]
            cases[f"cold_{target}"] = measurement(seconds, "s")
            cases[f"scoring_{target}"], tokens[target] = scoring(folder / "artifact", SCORING_ROUNDS * options.rounds)
    write(options, cases, f"cold_{targets[0]}", {"policy_tokens": tokens})
    return 0


if __name__ == "__main__":
    sys.exit(main())
