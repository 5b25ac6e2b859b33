"""Quantized artifacts made by the tools that others use, and by none of this project's quantizers: nothing in them is ours."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from deploy_targets.profile import SchemeSpec


def by_onnx_builder(model_dir: Path, folder: Path) -> Path:
    """What `python -m onnxruntime_genai.models.builder -p int4` leaves: a graph with its weights beside it."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(model_dir), "-o", str(folder), "-p", "int4", "-e", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "-c", str(folder) + ".cache"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def by_llama_cpp(model_dir: Path, folder: Path) -> Path:
    """What `llama-quantize f16.gguf Q4_K_M` leaves: one file. (The float16 file it starts from is written here: a converter's work.)"""
    import llama_cpp

    from deploy_targets.quantizers.gguf import GgufQuantizer

    converter = GgufQuantizer(SchemeSpec(quantizer="gguf", name="F16", bits=16), json.loads((model_dir / "config.json").read_text()))
    folder.mkdir()
    converter.write(folder / "f16", converter.quantize(load_file(model_dir / "model.safetensors").items()), model_dir)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    path = folder / "model-Q4_K_M.gguf"
    assert llama_cpp.llama_model_quantize(str(folder / "f16").encode(), str(path).encode(), ctypes.byref(parameters)) == 0
    (folder / "f16").unlink()
    return path


def by_compressed_tensors(model_dir: Path, folder: Path) -> Path:
    """What compressed-tensors packs and transformers saves: W4A16 in groups of 32, as llm-compressor's round-to-nearest has it."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply_quantization_config(lm, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized"))
    for module in lm.modules():
        if getattr(module, "quantization_scheme", None):
            groups = module.weight.detach().unflatten(-1, (-1, 32))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(lm)
    compressor.compress_model(lm)
    lm.save_pretrained(folder)
    compressor.update_config(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, folder)
    return folder


def worse_copy(model_dir: Path, folder: Path) -> Path:
    """The same model with one layer's MLP lost: what a broken conversion leaves."""
    from safetensors.torch import save_file

    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    tensors[name] = tensors[name] * 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
