"""How far several ranks of the learner are from one: loss, gap, gradient norm and lambda of the same updates under every ZeRO stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Measurement, arguments, measurement, write
from benchmarks.models import describe

ROOT = Path(__file__).parent.parent
NUM_RANKS = (1, 2, 4)
WHAT = {"loss": "losses", "gap": "gaps", "grad_norm": "grad_norms", "lambda": "lambdas"}
HEADLINE = "loss/zero3/2"


def run_ranks(num_ranks: int, model: Path, out: Path, num_updates: int) -> dict[str, Any]:
    """What rank 0 of so many, started by the deepspeed launcher, saw of each stage; all ranks were given the same bits of lambda."""
    out.mkdir()
    # What the command `deepspeed` runs, by this interpreter.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_ranks), "--no_local_rank"]
    command = [*launcher, "--module", "tests.rank_script", str(model), str(out), str(num_updates)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    for stage in found:
        told = {(out / f"lambdas-{stage}-{rank}").read_text() for rank in range(num_ranks)}
        assert len(told) == 1, f"ZeRO {stage}: ranks were given different lambdas"
    print(f"  {num_ranks} ranks", file=sys.stderr, flush=True)
    return found


def differences(one: dict[str, Any], many: dict[str, Any], stage: str, num_ranks: int) -> dict[str, Measurement]:
    """For each of `WHAT`: abs(many - one) / abs(one), update by update."""
    return {
        f"{what}/zero{stage}/{num_ranks}": measurement(
            [abs(b - a) / abs(a) if a else abs(b) for a, b in zip(one[key], many[key], strict=True)],
            "relative difference to one rank, by update",
            first=abs(many[key][0] - one[key][0]) / abs(one[key][0]),
            one_rank=one[key],
            these_ranks=many[key],
        )
        for what, key in WHAT.items()
    }


def main() -> None:
    options = arguments("ranks", __doc__, rounds=5)
    options.threads = 1
    with tempfile.TemporaryDirectory() as folder:
        from tests.models import tiny_model

        model = tiny_model("qwen3", Path(folder) / "model")
        found = {num: run_ranks(num, model, Path(folder) / str(num), options.rounds) for num in NUM_RANKS}
        cases = {
            name: case
            for num in NUM_RANKS[1:]
            for stage in found[1]
            for name, case in differences(found[1][stage], found[num][stage], stage, num).items()
        }
        write(options, cases, HEADLINE, {**describe(model), "launcher": "deepspeed", "num_ranks": NUM_RANKS, "sequences_per_update": 28})


if __name__ == "__main__":
    main()
