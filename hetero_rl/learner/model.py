"""The transformers model that the learner trains: loaded without running code of others, and found to be what the learner assumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploy_targets.errors import UsageError


def load_causal_lm(model_dir: Path) -> Any:
    """A transformers causal LM in bf16 from a local folder; safetensors only, no code from the model is run."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from hetero_rl.learner import attention

    lm = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.bfloat16,
        attn_implementation="sdpa" if torch.cuda.is_available() else attention.register(),
        trust_remote_code=False,
        use_safetensors=True,
    )
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
