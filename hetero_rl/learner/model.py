"""The transformers model that the learner trains: loaded without running code of others, and found to be what the learner assumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from deploy_targets.errors import UsageError
from deploy_targets.preflight import model_shapes
from deploy_targets.saved_names import saved_views


def load_causal_lm(model_dir: Path, dtype: torch.dtype | str = torch.bfloat16) -> Any:
    """A transformers causal LM from a local folder, in bf16 or another `dtype` (`auto`: the stored one).

    Safetensors only, no code from the model is run. Raises `UsageError` where transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from hetero_rl.learner import attention

    try:
        lm = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=dtype,
            attn_implementation="sdpa" if torch.cuda.is_available() else attention.register(),
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(f"transformers cannot load {model_dir} as a causal language model: {error}") from error
    lm.generation_config = GenerationConfig()  # a hub model may bring a repetition penalty, which no engine here applies
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the learner's log-probs must be a function of the weights alone
    return lm


def check_head(lm: Any) -> None:
    """The learner takes the output head's product for the logits. Raises `UsageError` for a model that does more."""
    ids = torch.arange(4)[None] % int(lm.config.vocab_size)
    with torch.no_grad():
        product = lm.get_output_embeddings()(lm.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
        logits = lm(input_ids=ids, use_cache=False).logits.float()
    if logits.shape != product.shape or (logits - product).abs().max() > 0.01 * product.abs().max():
        raise UsageError(
            f"{type(lm).__name__} changes its logits after the output head, which the learner does not repeat; choose a model without it"
        )


def stored_tensors(lm: Any, model_dir: Path) -> frozenset[str]:
    """The names of the tensors in the checkpoint of `model_dir`, found to be those that the learner hands out for `lm`.

    transformers renames, splits and merges the tensors of some families while loading. `saved_views` undoes the one case that is known,
    experts that are fused; its values are compared with the file's here. Raises `UsageError` for every other difference: what is
    published would not be what the engine reads.
    """
    stored = frozenset(model_shapes(model_dir))
    held = {saved: view for name, parameter in lm.named_parameters() for saved, view in saved_views(name, parameter.detach(), stored)}
    shared = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - held.keys()
    unknown = sorted(held.keys() - stored)
    lost = sorted(name for name in stored - held.keys() - shared if not name.endswith("rotary_emb.inv_freq"))
    if unknown or lost:
        raise UsageError(
            f"{type(lm).__name__} holds its weights under other names than {model_dir}: {_first(unknown)} are not in the checkpoint, "
            f"{_first(lost)} would not be trained or published. Save the model anew with save_pretrained, or choose another one"
        )
    split = held.keys() - {name for name, _ in lm.named_parameters()}
    for file in sorted(model_dir.glob("*.safetensors")) if split else ():
        with safe_open(file, "pt") as tensors:
            for name in split & set(tensors.keys()):
                if not torch.equal(held[name], tensors.get_tensor(name).to(held[name].dtype)):
                    raise UsageError(
                        f"{type(lm).__name__} does not hold {name} as it is stored, so it cannot be published; choose another model"
                    )
    return stored


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
