"""The graph of an ONNX target: onnxruntime-genai's own builder makes it, then every weight is pointed into one safetensors file."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from deploy_targets.cache import kept
from deploy_targets.errors import EngineError, MissingPackageError
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import tensor_layout

GRAPH_FILE = "model.onnx"
_CACHES = ("cos_cache", "sin_cache")
"""Initializers that depend on the config alone; they stay inside the graph file."""
_LAST_LINES = 12
_READ_BY_BUILDER = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Endings of the files of a model that say what it is and how it spells; the others hold weights, or nothing for a graph."""
_RANDOM_WEIGHTS = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
import torch
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """How the builder quantizes MatMul to MatMulNBits."""

    bits: int
    group_size: int
    accuracy_level: int
    """0 leaves it to the provider."""
    excluded_nodes: tuple[str, ...] = ()
    """The builder's names of the nodes that stay in floating point."""


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Which graph the builder shall make."""

    dtype: Literal["float32", "float16"]
    """Of activations, key-value cache and all weights that are not quantized."""
    provider: Literal["cpu", "cuda"]
    """Where onnxruntime-genai shall run the folder."""
    blocks: BlockOptions | None = None

    @property
    def layout(self) -> Literal["cpu", "cuda"]:
        """The builder's `-e`: it makes GroupQueryAttention in float32 for cpu and in float16 for cuda alone, and CPUs run both."""
        return "cpu" if self.dtype == "float32" else "cuda"

    def builder_options(self) -> list[str]:
        """The builder's command-line options, but for its paths."""
        precision = f"int{self.blocks.bits}" if self.blocks else "fp32" if self.dtype == "float32" else "fp16"
        # CPUs have no attention that normalises q and k by itself; a separate node runs everywhere.
        extra = ["fuse_qk_norm_gqa=false"]
        if self.blocks:
            extra += [f"accuracy_level={self.blocks.accuracy_level}", f"block_size={self.blocks.group_size}"]
            if self.blocks.excluded_nodes:
                extra.append("nodes_to_exclude=" + ",".join(self.blocks.excluded_nodes))
        return ["-p", precision, "-e", self.layout, "--extra_options", *extra]


def scaffold(model_dir: Path, out_dir: Path, spec: GraphSpec) -> None:
    """Write `model.onnx`, `genai_config.json` and the tokenizer files of `model_dir` into `out_dir`, which holds the weights file.

    The builder takes seconds to minutes, and what it makes does not depend on the weights: it is kept for the next run (`cache.py`).
    Raises `MissingPackageError` or `EngineError` (the builder's last lines, or how the graph differs from the file).
    """
    for package in ("onnx", "onnx_ir", "onnxruntime_genai", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "making the ONNX graph", "train" if package == "transformers" else "onnx-export")
    for file in kept("onnx-graphs", _key(model_dir, out_dir, spec), lambda folder: _build(model_dir, out_dir, spec, folder)):
        shutil.copy(file, out_dir)


def _key(model_dir: Path, out_dir: Path, spec: GraphSpec) -> list[object]:
    """All that the graph depends on: the model's small files, the layout of our weights, the options, and who builds it."""
    small = sorted(path for path in model_dir.iterdir() if path.is_file() and path.suffix in _READ_BY_BUILDER)
    files = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in small]
    versions = [version(package) for package in ("onnx", "onnx-ir", "onnxruntime-genai", "transformers")]
    return [files, sorted(tensor_layout(out_dir / WEIGHTS_FILE).items()), asdict(spec), versions, Path(__file__).read_text("utf-8")]


def _build(model_dir: Path, out_dir: Path, spec: GraphSpec, target: Path) -> None:
    """Run the builder, and write what it makes for the weights file of `out_dir` into `target`.

    It reads weights of its own accord; where `model_dir` has none, random ones stand in, as only the graph is kept.
    """
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
        paths = ["-m", str(source.resolve()), "-o", str(built), "-c", str(Path(folder) / "cache")]
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        _run([*builder, *paths, *spec.builder_options()], "the onnxruntime-genai builder")
        _write_graph(built / GRAPH_FILE, out_dir / WEIGHTS_FILE, spec, target / GRAPH_FILE)
        for file in built.iterdir():
            if not file.name.startswith(GRAPH_FILE):
                shutil.copy(file, target)
        if spec.provider == "cpu":
            _drop_providers(target / "genai_config.json")


def _drop_providers(path: Path) -> None:
    """Let onnxruntime-genai run the folder on the CPU, also where the layout is that of another provider."""
    config = json.loads(path.read_text("utf-8"))
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    path.write_text(json.dumps(config, indent=4) + "\n", "utf-8")


def _run(command: list[str], what: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    done = subprocess.run(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise EngineError(f"{what} failed with exit code {done.returncode}. Its last lines:\n{last}")


def _write_graph(built: Path, weights: Path, spec: GraphSpec, target: Path) -> None:
    """Copy the graph `built` to the file `target`, its weights turned into references into the safetensors file `weights`."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    model = onnx.load(str(built), load_external_data=False)
    layout = tensor_layout(weights)
    dtypes = {onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.FLOAT16: "F16", onnx.TensorProto.UINT8: "U8"}
    problems = _option_problems(model, spec)
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
    onnx.save(model, str(target))


def _option_problems(model: Any, spec: GraphSpec) -> list[str]:
    """Builder options that the weights do not show: the builder drops names it does not know without a word."""
    problems = []
    for node in model.graph.node:
        found = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits" and spec.blocks:
            wanted = {"bits": spec.blocks.bits, "block_size": spec.blocks.group_size, "accuracy_level": spec.blocks.accuracy_level}
            if wanted != {name: found.get(name, 0) for name in wanted}:
                problems.append(f"{node.name}: {found} instead of {wanted}")
        if node.op_type == "GroupQueryAttention" and "qk_norm_epsilon" in found:
            problems.append(f"{node.name}: normalises q and k, which CPUs cannot run")
    if not any(node.op_type == "GroupQueryAttention" for node in model.graph.node):
        problems.append("the graph has no GroupQueryAttention, which the engine's batches and cache are made for")
    return problems


def _point_at(tensor: Any, offset: int, length: int) -> None:
    import onnx

    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
