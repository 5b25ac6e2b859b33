"""The routers of a mixture of experts as transformers runs it: modules that name the experts of each token."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_MODELING = "transformers.models.qwen3_moe.modeling_qwen3_moe"
"""Imported by whoever made a model of it; any other model pays nothing for it."""


def find_routers(model: Any) -> list[nn.Module]:
    """The routers of `model`, lowest layer first; none where `families.ROUTED` does not name its family.

    The output of each is (logits [num_tokens, num_experts], weights [num_tokens, top_k], experts int64 [num_tokens, top_k]), where
    num_tokens counts a batch's tokens row by row, padding included.
    """
    modeling = sys.modules.get(_MODELING)
    return [] if modeling is None else [module for module in model.modules() if type(module) is modeling.Qwen3MoeTopKRouter]
