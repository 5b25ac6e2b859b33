"""bitsandbytes: the bytes that transformers itself would save, what the layers multiply with, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, Qwen3MoeConfig

from deploy_targets.engines.transformers import TransformersEngine
from deploy_targets.errors import EngineError, PreflightError, ProfileError
from deploy_targets.preflight import model_shapes, preflight
from deploy_targets.profile import SchemeSpec, load_profile, parse_profile, profile_text
from deploy_targets.quantizers.bitsandbytes import BitsAndBytesQuantizer
from deploy_targets.quantizers.model_files import read_config
from deploy_targets.types import WEIGHTS_FILE, TokenSequence, WeightFile
from deploy_targets.weights_file import write_weights
from tests.conftest import TinyModels
from tests.models import Family, save_tokenizer

pytest.importorskip("bitsandbytes")

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
UP_PROJ = "model.layers.1.mlp.up_proj"
BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "LLM_INT8": {"load_in_8bit": True},
}
SEQUENCES = [TokenSequence((5, 6, 7, *range(8, 8 + n)), 3) for n in range(1, 9)]


def spec(name: str, group_size: int | None = None, ignore: tuple[str, ...] | None = None) -> SchemeSpec:
    return SchemeSpec(quantizer="bitsandbytes", name=name, bits=4 if name == "NF4" else 8, group_size=group_size, ignore=ignore)


def write(model_dir: Path, folder: Path, scheme: SchemeSpec) -> BitsAndBytesQuantizer:
    """The artifact's folder of the model, as a publish makes it."""
    quantizer = BitsAndBytesQuantizer(scheme, read_config(model_dir))
    assert quantizer.offenders(model_shapes(model_dir)) == []
    tensors = load_file(model_dir / WEIGHTS_FILE)
    folder.mkdir(exist_ok=True)
    write_weights(folder / WEIGHTS_FILE, quantizer.quantize(tensors.items()), 4 * len(tensors) + 64)
    quantizer.scaffold(model_dir, folder)
    return quantizer


def engine(folder: Path, dtype: str = "bfloat16") -> TransformersEngine:
    return TransformersEngine(folder, {"dtype": dtype, "device": "cpu"}, weight_version=1)


def layer(served: TransformersEngine, name: str) -> torch.nn.Module:
    return served._model.get_submodule(name.removesuffix(".weight"))  # type: ignore[no-any-return]


def logps(served: TransformersEngine) -> np.ndarray:
    return np.concatenate([score.logps for score in served.score(SEQUENCES)])


@pytest.mark.parametrize("name", list(BY_TRANSFORMERS))
@pytest.mark.parametrize(("family", "tied"), [("qwen3", False), ("qwen2", True), ("llama", False)])
def test_the_bytes_are_those_that_transformers_saves(
    tiny_models: TinyModels, tmp_path: Path, name: str, family: Family, tied: bool
) -> None:
    model_dir = tiny_models(family, tied=tied)
    asked = BitsAndBytesConfig(**BY_TRANSFORMERS[name], llm_int8_skip_modules=["lm_head"])
    AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=asked, dtype=torch.bfloat16).save_pretrained(tmp_path / "theirs")
    write(model_dir, tmp_path / "ours", spec(name))
    theirs, ours = (load_file(tmp_path / folder / WEIGHTS_FILE) for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert any(tensor.dtype in (torch.uint8, torch.int8) for tensor in ours.values())
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[key], tensor), key
    configs = [json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"] for folder in ("theirs", "ours")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", list(BY_TRANSFORMERS))
def test_plain_transformers_loads_the_folder_and_gives_the_engines_log_probs(tiny_models: TinyModels, tmp_path: Path, name: str) -> None:
    write(tiny_models("qwen3"), tmp_path, spec(name))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = []
    for sequence in SEQUENCES:
        with torch.inference_mode():
            log_probs = torch.log_softmax(model(torch.tensor([sequence.tokens])).logits[0].float(), dim=-1).numpy()
        places = np.arange(sequence.prompt_len - 1, len(sequence.tokens) - 1)
        expected.append(log_probs[places, sequence.tokens[sequence.prompt_len :]])
    served = engine(tmp_path)
    one_by_one = np.concatenate([served.score([sequence])[0].logps for sequence in SEQUENCES])
    # LLM.int8() runs the same kernels. For NF4 a CPU with AVX512-BF16 has a kernel of its own, which the engine leaves aside.
    np.testing.assert_allclose(one_by_one, np.concatenate(expected), rtol=0, atol=0.05 if name == "NF4" else 0)


@pytest.mark.parametrize("block_size", [32, 64, 128, None])
def test_nf4_layers_multiply_with_the_dequantized_weight_bit_for_bit(
    tiny_models: TinyModels, tmp_path: Path, block_size: int | None
) -> None:
    model_dir = tiny_models("qwen3")
    quantizer = write(model_dir, tmp_path, spec("NF4", block_size))
    weight = load_file(model_dir / WEIGHTS_FILE)[Q_PROJ]
    quantized = layer(engine(tmp_path), Q_PROJ)
    assert type(quantized).__name__ == "Linear4bit"
    with torch.inference_mode():
        rows = quantized(torch.eye(weight.shape[1], dtype=torch.bfloat16)).T
    made = quantizer.dequantized(Q_PROJ, weight)
    assert torch.equal(rows, made)
    assert 0.05 < float((made - weight).float().norm() / weight.float().norm()) < 0.15


def test_llm_int8_layers_round_activations_per_token_but_for_outliers(tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("qwen3")
    quantizer = write(model_dir, tmp_path, spec("LLM_INT8"))
    weight = load_file(model_dir / WEIGHTS_FILE)[Q_PROJ].float()
    tokens = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(0))
    tokens[3, 7], tokens[5, 11] = 40.0, -9.0
    tokens = tokens.half().float()
    outliers = tokens.abs() >= 6
    inliers = tokens.masked_fill(outliers, 0)
    scales = inliers.abs().amax(dim=1, keepdim=True) / 127
    rounded = torch.where(outliers.any(dim=0), tokens, (inliers / scales).round() * scales)
    quantized = layer(engine(tmp_path, "float32"), Q_PROJ)
    with torch.inference_mode():
        given = quantized(tokens)
    made = quantizer.dequantized(Q_PROJ, weight)
    assert (given - rounded @ made.T).abs().max() < 2e-3
    assert (given - tokens @ made.T).abs().max() > 1e-2
    assert 0.001 < float((made - weight).norm() / weight.norm()) < 0.01


def test_a_forward_pass_logs_nothing(tiny_models: TinyModels, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tiny_models("qwen3"), tmp_path, spec("LLM_INT8"))
    logps(engine(tmp_path))
    assert [record for record in caplog.records if record.name.startswith("bitsandbytes")] == []


@pytest.mark.parametrize("name", list(BY_TRANSFORMERS))
def test_float32_masters_quantize_like_their_bf16_copies(tiny_models: TinyModels, name: str) -> None:
    model_dir = tiny_models("qwen3")
    quantizer = BitsAndBytesQuantizer(spec(name), read_config(model_dir))
    copy = load_file(model_dir / WEIGHTS_FILE)[Q_PROJ]
    master = copy.float() * 1.0001
    stored, of_copy = (dict(quantizer.quantize([(Q_PROJ, tensor)])) for tensor in (master, copy))
    assert all(torch.equal(tensor, of_copy[key]) for key, tensor in stored.items())
    assert quantizer.dequantized(Q_PROJ, master).dtype == torch.float32
    assert torch.equal(quantizer.dequantized(Q_PROJ, master).bfloat16(), quantizer.dequantized(Q_PROJ, copy))


@pytest.mark.parametrize("name", list(BY_TRANSFORMERS))
def test_ignored_layers_stay_linear_and_no_others(tiny_models: TinyModels, tmp_path: Path, name: str) -> None:
    model_dir = tiny_models("qwen3")
    quantizer = write(model_dir, tmp_path, spec(name, ignore=("lm_head", UP_PROJ, "re:.*layers\\.0\\.mlp")))
    served = engine(tmp_path)
    plain = {key for key, module in served._model.named_modules() if type(module) is torch.nn.Linear}
    assert plain == {"lm_head", UP_PROJ, *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down"))}
    assert not quantizer.quantizes(f"{UP_PROJ}.weight")
    assert np.isfinite(logps(served)).all()


def test_an_empty_ignore_quantizes_the_head_as_well(tiny_models: TinyModels, tmp_path: Path) -> None:
    model_dir = tiny_models("qwen3")
    write(model_dir, tmp_path, spec("LLM_INT8", ignore=()))
    assert type(layer(engine(tmp_path), "lm_head")).__name__ == "Linear8bitLt"
    quantizer = BitsAndBytesQuantizer(spec("NF4", ignore=()), read_config(model_dir))
    assert quantizer.offenders(model_shapes(model_dir)) == [
        "lm_head.weight [36, 128]: the output size 36 is no multiple of 32, which bitsandbytes' CPU kernel needs"
    ]


def test_a_file_in_other_blocks_is_refused_and_changes_nothing(tiny_models: TinyModels, tmp_path: Path) -> None:
    write(tiny_models("qwen3"), tmp_path, spec("NF4", 64))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    last = "model.layers.1.self_attn.v_proj.weight.quant_state.bitsandbytes__nf4"
    tensors = {key: tensor + 1 if key == "model.norm.weight" else tensor for key, tensor in tensors.items()}
    tensors[last] = torch.tensor(list(bytes(tensors[last].tolist()).replace(b'"blocksize": 64', b'"blocksize": 32')), dtype=torch.uint8)
    write_weights(tmp_path / "wrong.safetensors", tensors.items(), len(tensors))
    served = engine(tmp_path)
    before = logps(served)
    with pytest.raises(EngineError, match=r"layers\.1\.self_attn\.v_proj: .*blocks of 32"):
        served.update(WeightFile(tmp_path / "wrong.safetensors", 2))
    assert served.weight_version == 1
    np.testing.assert_array_equal(logps(served), before)


def test_every_misfit_of_a_model_is_listed(tiny_models: TinyModels) -> None:
    model_dir = tiny_models("qwen2", tied=True)
    shapes = {**model_shapes(model_dir), Q_PROJ: (100, 130)}
    found = BitsAndBytesQuantizer(spec("NF4", ignore=("lm_heed",)), read_config(model_dir)).offenders(shapes)
    assert [line.split(":")[0] for line in found] == [
        "scheme.ignore 'lm_heed'", "lm_head", f"{Q_PROJ} [100, 130]", f"{Q_PROJ} [100, 130]",
    ]  # fmt: skip
    assert "did you mean 'lm_head'" in found[0]
    assert BitsAndBytesQuantizer(spec("NF4", ignore=("lm_head",)), read_config(model_dir)).offenders(model_shapes(model_dir)) == []


def moe_config() -> dict[str, Any]:
    config: dict[str, Any] = Qwen3MoeConfig(
        vocab_size=36, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    ).to_dict()  # fmt: skip
    return {**config, "model_type": "qwen3_moe"}


def test_experts_that_transformers_fuses_are_refused_before_anything_starts(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(moe_config()))
    names = [f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight" for expert in range(4) for part in ("gate", "up", "down")]
    names.append("model.layers.0.self_attn.q_proj.weight")
    tensors = {"model.embed_tokens.weight": torch.zeros(36, 64), **{name: torch.zeros(64, 64) for name in names}}
    write_weights(tmp_path / WEIGHTS_FILE, tensors.items(), 64)
    with pytest.raises(PreflightError, match=r"experts\.0\.gate_proj.*, \.\.\.: transformers renames or fuses 12 tensors"):
        preflight(load_profile("nf4-transformers"), tmp_path)


def test_layers_that_are_not_linear_are_named() -> None:
    config = {**GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2).to_dict(), "model_type": "gpt2"}
    name = "transformer.h.0.attn.c_attn.weight"
    found = BitsAndBytesQuantizer(spec("NF4"), config).offenders({name: (64, 192)})
    assert found == [
        f"{name} [64, 192]: transformers does not run it as a linear layer; add 'transformer.h.0.attn.c_attn' to scheme.ignore"
    ]


def test_a_model_type_that_transformers_does_not_know_is_an_offender() -> None:
    found = BitsAndBytesQuantizer(spec("NF4"), {"model_type": "qwen99"}).offenders({Q_PROJ: (64, 64)})
    assert len(found) == 1
    assert "transformers cannot build the model of this config.json" in found[0]


def test_bad_schemes_are_refused_with_everything_at_once() -> None:
    with pytest.raises(ProfileError) as caught:
        BitsAndBytesQuantizer(SchemeSpec(quantizer="bitsandbytes", name="NF4", bits=8, group_size=48, symmetric=False), {})
    assert [line.split(":")[0].removeprefix("scheme.") for line in caught.value.offenders] == ["group_size", "bits", "symmetric"]
    with pytest.raises(ProfileError) as caught:
        BitsAndBytesQuantizer(SchemeSpec(quantizer="bitsandbytes", name="LLM_INT8", bits=4, group_size=64), {})
    assert [line.split(":")[0].removeprefix("scheme.") for line in caught.value.offenders] == ["group_size", "bits"]
    with pytest.raises(ProfileError, match=r"NF4 and LLM_INT8 are made here \(got 'FP4'\)"):
        BitsAndBytesQuantizer(SchemeSpec(quantizer="bitsandbytes", name="FP4", bits=4), {})


def test_the_shipped_profiles_are_of_this_quantizer() -> None:
    for target, name in (("nf4-transformers", "NF4"), ("int8-transformers", "LLM_INT8")):
        profile = parse_profile(profile_text(target), target)
        assert (profile.name, profile.scheme.name, profile.scheme.quantizer) == (target, name, "bitsandbytes")
        BitsAndBytesQuantizer(profile.scheme, {})
