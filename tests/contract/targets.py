"""What the contract suite runs on: every shipped target, opened on tiny models as a training run does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deploy_targets.catalog import make_quantizer, open_engine
from deploy_targets.profile import TargetProfile, load_profile
from deploy_targets.protocols import CalibratedQuantizer, Engine, FileQuantizer, Quantizer
from deploy_targets.quantizers.compressed_weights import quantize_float8, quantize_int8
from deploy_targets.quantizers.kv_cache import cache_rounding
from deploy_targets.saved_names import saved_views
from deploy_targets.types import WEIGHTS_FILE, TokenScores, TokenSequence, WeightFile
from deploy_targets.weights_file import weights_name, write_version, write_weights
from hetero_rl.learner.attention import register
from tests.conftest import TinyModels
from tests.skips import skip_unless_it_runs_here

MAX_MODEL_LEN = 48
LOGP_TOLERANCE_NATS = {
    "fake": 1e-5,
    "fp8-vllm": 0.2,
    "fp8-block-vllm": 0.2,
    "int4-onnx": 1e-3,
    "int8-onnx": 1e-3,
    "fp32-onnx": 1e-3,
    "fp16-onnx": 0.03,
    "int8-transformers": 0.2,
}
"""How far two ways of computing the same log-prob may differ (decode or prefill, one or many): bf16 against float32 arithmetic.

FP8 activations are coarse enough for a rounding difference of bf16 to move one to the next FP8 value. So are the INT8
activations of LLM.int8(): after one that moved, later layers round differently too, and two computations differ by about as
much (0.01 nats in the mean here) as either differs from one without rounding. That is why the reference does not repeat it.
float16 logits beyond 8 are 0.008 apart.

llama.cpp rounds activations to
int8 and keeps keys and values in float16, which moves one in twenty of them to the next step: 0.05 nats at most between generation
and scoring, 0.016 on average and 0.07 at most from the reference, which rounds nothing; repeating the rounding there brings them no closer.
"""
BF16_TOLERANCE_NATS = 0.1
"""The same for every target that the table does not name."""

K_QUANTS = ("q4_k_m-llamacpp", "q3_k_s-llamacpp", "q2_k-llamacpp")
BLOCK_SIZES = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 8}
MODEL_OPTIONS: dict[str, dict[str, float]] = {
    **{name: {"hidden_size": 256, "head_dim": 64} for name in K_QUANTS},
    "fp8-vllm": {"outlier": 2e5},
    "fp8-block-vllm": {"outlier": 2e5, **BLOCK_SIZES},
}
"""What a target needs of the first model: rows of whole K-quant blocks, whole blocks of 128 x 128, or weights so uneven that rounding
them to 8 bits shows above the rounding of activations (FP8 rounds most weights alike, but not those below 2^-15 of the largest)."""
BIASED_MODEL_OPTIONS: dict[str, dict[str, float]] = {"fp8-block-vllm": BLOCK_SIZES}
"""The same of the second model."""


def model_options(name: str) -> dict[str, float]:
    """Of the first model: a target of 8 bits that the table does not name gets the uneven weights that suit integers."""
    return MODEL_OPTIONS.get(name, {"outlier": 32} if load_profile(name).scheme.bits == 8 else {})


def tolerance_of(name: str) -> float:
    return LOGP_TOLERANCE_NATS.get(name, BF16_TOLERANCE_NATS)


def mean_limit(tolerance: float) -> float:
    """How far scores may be from the reference in the mean, nats: below the tolerance, which bounds single tokens."""
    return tolerance / 4


def biased_model(tiny_models: TinyModels, name: str = "") -> Path:
    """The second model of the suite: Qwen2, with biases and tied embeddings."""
    return tiny_models("qwen2", tied=True, max_position_embeddings=512, **BIASED_MODEL_OPTIONS.get(name, {}))


@dataclass(frozen=True)
class Target:
    """A profile, two versions of a model in its checkpoint format, and the folder it is served from."""

    profile: TargetProfile
    quantizer: Quantizer
    model_dir: Path
    folder: Path
    versions: dict[int, Path]

    @property
    def tolerance(self) -> float:
        return tolerance_of(self.profile.name)

    def open(self, weight_version: int = 1) -> Engine:
        return open_engine(self.profile, self.folder, weight_version)

    def weights(self, version: int, weight_version: int) -> WeightFile:
        return WeightFile(self.versions[version], weight_version)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Version 1 of the weights before they were quantized."""
        return load_file(self.model_dir / WEIGHTS_FILE)

    def write(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
        """`tensors` in the target's checkpoint format."""
        write_version(path, self.quantizer, tensors.items(), self.model_dir, 4 * len(tensors) + 16)
        return path

    def write_without_last_tensor(self, path: Path) -> str:
        """Write version 2 of the weights without the last of its tensors to `path`; returns that tensor's name."""
        if isinstance(self.quantizer, FileQuantizer):
            return gguf_without_last_tensor(self.versions[2], path)
        tensors = dict(load_file(self.versions[2]))
        lost = sorted(tensors)[-1]
        del tensors[lost]
        write_weights(path, tensors.items(), 4 * len(tensors))
        return lost


def make_target(name: str, model_dir: Path, folder: Path) -> Target:
    profile = load_profile(name)
    skip_unless_it_runs_here(profile)
    profile = profile.model_copy(update={"max_model_len": MAX_MODEL_LEN})
    quantizer = make_quantizer(profile, model_dir)
    first = load_file(model_dir / WEIGHTS_FILE)
    assert quantizer.offenders({name: tuple(tensor.shape) for name, tensor in first.items()}) == []
    if isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_calibration:
        quantizer.calibrate(first.items(), uneven_grams(quantizer, first))
    generator = torch.Generator().manual_seed(1)
    second = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * (tensor != 0)
        for key, tensor in first.items()
    }
    served, updates = folder / "served", folder / "updates"
    served.mkdir()
    updates.mkdir()
    suffix = Path(weights_name(quantizer)).suffix
    target = Target(profile, quantizer, model_dir, served, {1: updates / f"one{suffix}", 2: updates / f"two{suffix}"})
    for version, tensors in {1: first, 2: second}.items():
        target.write(target.versions[version], tensors)
    (served / weights_name(quantizer)).write_bytes(target.versions[1].read_bytes())
    quantizer.scaffold(model_dir, served)
    return target


def uneven_grams(quantizer: Quantizer, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A mean Gram matrix for every quantized weight, of inputs whose channels are of very different sizes."""
    grams = {}
    for name, tensor in tensors.items():
        if quantizer.quantizes(name):
            generator = torch.Generator().manual_seed(tensor.shape[1])
            inputs = torch.randn(512, tensor.shape[1], generator=generator) * torch.randn(tensor.shape[1], generator=generator).exp()
            grams[name] = inputs.T @ inputs / len(inputs)
    return grams


def gguf_without_last_tensor(source: Path, path: Path) -> str:
    """Copy the GGUF file `source` to `path`, its last tensor left out of the header; returns that tensor's name."""
    import gguf

    reader = gguf.GGUFReader(source)
    field = reader.fields["general.architecture"]
    writer = gguf.GGUFWriter(path, field.contents())
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, entry.contents(), entry.types[0], entry.types[-1] if len(entry.types) > 1 else None)
    for tensor in reader.tensors[:-1]:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(reader.tensors[-1].name)


def random_prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 36, size=rng.integers(shortest, longest + 1)).tolist() for _ in range(count)]


def random_sequences(count: int, seed: int = 0) -> list[TokenSequence]:
    prompts, responses = random_prompts(count, seed), random_prompts(count, seed + 1)
    return [TokenSequence((*prompt, *response), len(prompt)) for prompt, response in zip(prompts, responses, strict=True)]


def all_logps(scores: list[TokenScores]) -> NDArray[np.float32]:
    return np.concatenate([score.logps for score in scores])


def largest_gap(first: list[TokenScores], second: list[TokenScores]) -> float:
    """Largest absolute difference of two lists of scores, nats; NaN when any log-prob is."""
    return float(np.abs(all_logps(first) - all_logps(second)).max())


ROUND_PER_TOKEN = {"FP8_DYNAMIC": quantize_float8, "W8A8": quantize_int8}
"""Scheme -> how its kernels round activations: each token's on the grid of a scale of its own, as rows of a weight are."""


def rounded_per_token(scheme: str, activations: torch.Tensor) -> torch.Tensor:
    """What the kernels of `scheme` multiply with in place of `activations` [..., hidden]."""
    values, scales = ROUND_PER_TOKEN[scheme](activations.flatten(0, -2))
    return (values.float() * scales).view(activations.shape)


def reference_logps(target: Target, sequences: list[TokenSequence]) -> NDArray[np.float32]:
    """The scores of transformers in float32, with the weights that the quantizer says the engine computes with."""
    model = load_reference(target.model_dir)
    stored = target.tensors()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for saved_name, view in saved_views(name, parameter, stored):
                view.copy_(target.quantizer.dequantized(saved_name, view))
    scheme = target.profile.scheme.name
    if scheme in ROUND_PER_TOKEN:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and target.quantizer.quantizes(f"{name}.weight"):
                module.register_forward_pre_hook(lambda module, inputs: (rounded_per_token(scheme, inputs[0]),))
    rounding = cache_rounding(target.profile)
    if rounding is None:
        return model_logps(model, sequences)
    model.set_attn_implementation(register())
    return model_logps(model, sequences, cache_rounding=rounding)


def load_reference(model_dir: Path) -> Any:
    """transformers' model in float32, with the weights as they were before anything was rounded."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def model_logps(model: Any, sequences: list[TokenSequence], **arguments: Any) -> NDArray[np.float32]:
    """The log-probs of all responses, one after the other; each sequence is computed alone, with `arguments` for the model."""
    logps = []
    for sequence in sequences:
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([sequence.tokens]), use_cache=False, **arguments).logits[0], dim=-1)
        given = torch.tensor(sequence.tokens[sequence.prompt_len :])
        logps.append(log_probs[sequence.prompt_len - 1 : -1].gather(1, given[:, None])[:, 0].numpy())
    return np.concatenate(logps)
