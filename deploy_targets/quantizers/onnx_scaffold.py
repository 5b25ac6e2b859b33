"""The graph of an ONNX target: onnxruntime-genai's own builder makes it, then every weight is pointed into one safetensors file."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy_targets.errors import EngineError, MissingPackageError
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import tensor_layout

GRAPH_FILE = "model.onnx"
_CACHES = ("cos_cache", "sin_cache")
"""Initializers that depend on the config alone; they stay inside the graph file."""
_LAST_LINES = 12
_RANDOM_WEIGHTS = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
import torch
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


def scaffold(model_dir: Path, out_dir: Path, group_size: int, accuracy_level: int, excluded_nodes: list[str]) -> None:
    """Write `model.onnx`, `genai_config.json` and the tokenizer files of `model_dir` into `out_dir`, which holds the weights file.

    The builder reads weights of its own accord; where `model_dir` has none, random ones stand in, as only the graph is
    kept. Raises `MissingPackageError` or `EngineError` (the builder's last lines, or how the graph differs from the file).
    """
    for package in ("onnx", "onnx_ir", "onnxruntime_genai", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "making the ONNX graph", "train" if package == "transformers" else "onnx-export")
    with tempfile.TemporaryDirectory(prefix="onnx-scaffold-") as folder:
        source = model_dir
        if not any(model_dir.glob("*.safetensors")):
            source = Path(folder) / "source"
            source.mkdir()
            _run([sys.executable, "-c", _RANDOM_WEIGHTS, str(model_dir), str(source)], "initialising a model for the graph")
            for file in model_dir.iterdir():
                if file.is_file() and not (source / file.name).exists():
                    shutil.copy(file, source)
        built = Path(folder) / "built"
        options = [f"accuracy_level={accuracy_level}", f"block_size={group_size}"]
        if excluded_nodes:
            options.append("nodes_to_exclude=" + ",".join(excluded_nodes))
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        paths = ["-m", str(source.resolve()), "-o", str(built), "-c", str(Path(folder) / "cache")]
        _run([*builder, *paths, "--extra_options", *options], "the onnxruntime-genai builder")
        _write_graph(built / GRAPH_FILE, out_dir, group_size, accuracy_level)
        for file in built.iterdir():
            if not file.name.startswith(GRAPH_FILE):
                shutil.copy(file, out_dir)


def _run(command: list[str], what: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    done = subprocess.run(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise EngineError(f"{what} failed with exit code {done.returncode}. Its last lines:\n{last}")


def _write_graph(built: Path, out_dir: Path, group_size: int, accuracy_level: int) -> None:
    """Copy the graph `built` to `out_dir`, its weights turned into references into `out_dir`'s safetensors file."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    model = onnx.load(str(built), load_external_data=False)
    layout = tensor_layout(out_dir / WEIGHTS_FILE)
    dtypes = {onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.UINT8: "U8"}
    problems = _option_problems(model, group_size, accuracy_level)
    for tensor in model.graph.initializer:
        if tensor.name in _CACHES:
            load_external_data_for_tensor(tensor, str(built.parent))
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            continue
        wanted = (dtypes.get(tensor.data_type, str(tensor.data_type)), tuple(tensor.dims))
        if tensor.name not in layout:
            problems.append(f"{tensor.name}: in the graph, not in the weights file")
            continue
        dtype, shape, offset, length = layout.pop(tensor.name)
        if (dtype, shape) != wanted:
            problems.append(f"{tensor.name}: {wanted} in the graph, {(dtype, shape)} in the weights file")
            continue
        _point_at(tensor, offset, length)
    problems += [f"{name}: in the weights file, not in the graph" for name in layout]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise EngineError(f"the graph of the onnxruntime-genai builder does not match the weights file (tested with 0.18):\n{lines}")
    onnx.save(model, str(out_dir / GRAPH_FILE))


def _option_problems(model: Any, group_size: int, accuracy_level: int) -> list[str]:
    """Builder options that the graph does not show: the builder drops names it does not know without a word."""
    problems = []
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            found = {attribute.name: attribute.i for attribute in node.attribute}
            if (found["block_size"], found.get("accuracy_level", 0)) != (group_size, accuracy_level):
                problems.append(f"{node.name}: {found} instead of block_size {group_size} and accuracy_level {accuracy_level}")
    return problems


def _point_at(tensor: Any, offset: int, length: int) -> None:
    import onnx

    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
