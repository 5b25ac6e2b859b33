"""ONNX artifacts for tests: the real model builder and the real quantizers, on tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from deploy_targets.profile import SchemeSpec
from deploy_targets.quantizers.onnx_float import OnnxFloatQuantizer
from deploy_targets.quantizers.onnx_matmulnbits import OnnxMatMulNBitsQuantizer
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import write_weights


def scheme(name: str = "W4A16", **options: Any) -> SchemeSpec:
    """The scheme `name`, of groups of 32 inputs where it has groups."""
    if name.startswith("FP"):
        return SchemeSpec(quantizer="onnx-float", name=name, bits=int(name[2:]), **options)
    return SchemeSpec(quantizer="onnx-matmulnbits", name=name, bits=int(name[1]), **{"group_size": 32, **options})


def quantizer(model_dir: Path, **options: Any) -> OnnxMatMulNBitsQuantizer | OnnxFloatQuantizer:
    spec, config = scheme(**options), json.loads((model_dir / "config.json").read_text())
    return OnnxFloatQuantizer(spec, config) if spec.quantizer == "onnx-float" else OnnxMatMulNBitsQuantizer(spec, config)


def checkpoint(model_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(model_dir / "model.safetensors")


def make_artifact(model_dir: Path, out_dir: Path, **options: Any) -> Path:
    """A servable folder made the way a run makes it: weights first, then the graph that points into them."""
    maker = quantizer(model_dir, **options)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_weights(out_dir / WEIGHTS_FILE, maker.quantize(checkpoint(model_dir).items()), num_tensors_max=200)
    maker.scaffold(model_dir, out_dir)
    return out_dir


def builder_initializers(
    model_dir: Path, out_dir: Path, precision: str, provider: str, *extra_options: str
) -> dict[str, np.ndarray[Any, Any]]:
    """Every initializer that onnxruntime-genai's builder writes for `model_dir`, by name, but for the rotary caches."""
    import onnx

    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(model_dir), "-o", str(out_dir)]
    command += ["-p", precision, "-e", provider, *(["--extra_options", *extra_options] if extra_options else [])]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    graph = onnx.load(str(out_dir / "model.onnx")).graph
    return {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer if i.name not in ("cos_cache", "sin_cache")}
