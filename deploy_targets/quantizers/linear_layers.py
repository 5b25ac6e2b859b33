"""Which layers of a model transformers runs as linear layers, and under which names: read off the model's structure, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Structure:
    """Names within the model that transformers builds for a config."""

    linears: frozenset[str]
    """Modules that are `torch.nn.Linear` itself, the ones that transformers' quantized loaders replace."""
    tensors: frozenset[str]
    """Names of all parameters and buffers."""


def model_structure(model_config: Mapping[str, Any]) -> Structure:
    """The structure of the causal LM of a parsed `config.json`. Raises `ValueError` when transformers has no such model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(**{key: value for key, value in model_config.items() if key != "quantization_config"})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"transformers cannot build the model of this config.json: {error}") from error
    linears = frozenset(name for name, module in model.named_modules() if type(module) is torch.nn.Linear)
    return Structure(linears, frozenset(model.state_dict()))
