"""The models that are measured: random weights, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from deploy_targets.catalog import make_quantizer
from deploy_targets.profile import TargetProfile, load_profile
from deploy_targets.types import WEIGHTS_FILE

LARGER_VOCAB_SIZE = 8192


def tiny(folder: Path, *, quick: bool = False) -> Path:
    """Qwen3, 3M parameters: 4 layers of 256 (2 layers of 128 when `quick`)."""
    from tests.models import tiny_model

    if quick:
        return tiny_model("qwen3", folder)
    return tiny_model("qwen3", folder, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64)


def medium(folder: Path) -> Path:
    """Qwen3, about 100M parameters: 12 layers of 768."""
    return _qwen3(folder, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=6)


def large(folder: Path) -> Path:
    """Qwen3, about 500M parameters, the layers of Qwen3-0.6B and more of them: 34 layers of 1024."""
    return _qwen3(folder, hidden_size=1024, intermediate_size=3072, num_hidden_layers=34, num_attention_heads=16, num_key_value_heads=8)


def _qwen3(folder: Path, **sizes: int) -> Path:
    """Random weights of `sizes`, and a vocabulary of 8192 of which the tokenizer spells the first few."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.models import BOS_ID, EOS_ID, PAD_ID, save_tokenizer

    save_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=LARGER_VOCAB_SIZE,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        **sizes,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


SIZES: dict[str, Callable[[Path], Path]] = {"tiny": tiny, "100M": medium, "500M": large}


def profile_for(target: str, num_threads: int) -> TargetProfile:
    """A shipped target whose engine uses `num_threads` threads."""
    profile = load_profile(target)
    engine = profile.engine.model_copy(update={"options": {**profile.engine.options, "num_threads": num_threads}})
    return profile.model_copy(update={"engine": engine})


def serving_folder(profile: TargetProfile, model_dir: Path, folder: Path) -> Path:
    """The model of `model_dir` in the target's native format, as a publish writes it."""
    from safetensors.torch import load_file

    from deploy_targets.weights_file import weights_name, write_version

    quantizer = make_quantizer(profile, model_dir)
    tensors = load_file(model_dir / WEIGHTS_FILE)
    folder.mkdir(parents=True)
    write_version(folder / weights_name(quantizer), quantizer, tensors.items(), model_dir, num_tensors_max=4 * len(tensors) + 64)
    quantizer.scaffold(model_dir, folder)
    return folder


def num_parameters(model_dir: Path) -> int:
    """Parameters of a saved checkpoint."""
    from math import prod

    from deploy_targets.weights_file import tensor_layout

    return sum(prod(shape) for _, shape, _, _ in tensor_layout(model_dir / WEIGHTS_FILE).values())


def describe(model_dir: Path) -> dict[str, int]:
    """Sizes for the record."""
    config = json.loads((model_dir / "config.json").read_text("utf-8"))
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {**{key: config[key] for key in keys}, "num_parameters": num_parameters(model_dir)}
