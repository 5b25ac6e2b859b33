"""Does GPTQModel read what `int4-gptq-vllm` writes? It wants an environment of its own, so this runs twice.

    .venv/bin/python scripts/check_gptqmodel.py write MODEL_DIR FOLDER
    python -m venv gptqmodel && gptqmodel/bin/pip install torch torchvision requests setuptools
    gptqmodel/bin/pip install --no-build-isolation gptqmodel==7.2.0
    gptqmodel/bin/python scripts/check_gptqmodel.py read FOLDER

`write` puts the checkpoint and the logits of the learner's twin into FOLDER; `read` has GPTQModel compute them on the CPU, and exits with 1
unless they are several times nearer to the twin's than those of weights rounded to nearest are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hetero_rl.learner.fake_quant import TwinLayer

EXPECTED = "expected_logits.json"
TOKENS = list(range(3, 27))
SHARE = 0.3
"""Of the mean difference between the logits of the twin and those of weights rounded to nearest: what arithmetic may make up."""


def write(model_dir: Path, folder: Path) -> None:
    """The checkpoint as a training run publishes it, rounded by the inputs that `TOKENS` give."""
    from deploy_targets.catalog import make_quantizer
    from deploy_targets.profile import load_profile
    from deploy_targets.types import WEIGHTS_FILE
    from deploy_targets.weights_file import write_weights
    from hetero_rl.learner.fake_quant import add_twin
    from hetero_rl.learner.gram import input_grams
    from hetero_rl.learner.model import load_causal_lm, stored_tensors

    quantizer = make_quantizer(load_profile("int4-gptq-vllm"), model_dir)
    lm = load_causal_lm(model_dir)
    layers = add_twin(lm, quantizer, stored_tensors(lm, model_dir), keep=False)
    nearest = logits_of(lm, layers)
    quantizer.calibrate(lm.named_parameters(), input_grams(lm, layers, [tuple(TOKENS)], 4096))
    folder.mkdir(parents=True)
    write_weights(folder / WEIGHTS_FILE, quantizer.quantize(lm.named_parameters()), num_tensors_max=4096)
    quantizer.scaffold(model_dir, folder)
    (folder / EXPECTED).write_text(json.dumps({"twin": logits_of(lm, layers).tolist(), "nearest": nearest.tolist()}))


def logits_of(lm: Any, layers: list[TwinLayer]) -> torch.Tensor:
    """Those of the twin: float32 [len(TOKENS), vocab]."""
    from hetero_rl.learner.fake_quant import twin

    with torch.no_grad(), twin(layers):
        return lm(torch.tensor([TOKENS])).logits[0].float()  # type: ignore[no-any-return]


def read(folder: Path) -> int:
    """Load the folder by GPTQModel's plain torch kernel, and compare."""
    from gptqmodel import BACKEND, GPTQModel

    stored = json.loads((folder / EXPECTED).read_text())
    twin, nearest = torch.tensor(stored["twin"]), torch.tensor(stored["nearest"])
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH)
    with torch.no_grad():
        logits = model.model(torch.tensor([TOKENS])).logits[0].float()
    gap, scale = float((logits - twin).abs().mean()), float((nearest - twin).abs().mean())
    sys.stdout.write(f"mean difference of logits: {gap:.4f} to the twin; {scale:.4f} between the twin and rounding to nearest\n")
    return int(not gap <= SHARE * scale)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writer, reader = commands.add_parser("write"), commands.add_parser("read")
    writer.add_argument("model_dir", type=Path)
    for command in (writer, reader):
        command.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "write":
        write(arguments.model_dir, arguments.folder)
        return 0
    return read(arguments.folder)


if __name__ == "__main__":
    sys.exit(main())
