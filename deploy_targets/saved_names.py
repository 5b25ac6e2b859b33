"""Parameters as transformers holds them in memory -> tensors as checkpoints hold them, which engines and quantizers speak of.

The two differ for mixtures of experts: transformers 5 runs the experts of a layer as `mlp.experts.gate_up_proj` [num_experts, 2 x width,
hidden] and `mlp.experts.down_proj` [num_experts, hidden, width], and saves them one by one as `mlp.experts.0.gate_proj.weight` [width,
hidden] and so on (its own conversion, `transformers.core_model_loading`, copies what it splits; these are views, good for writing too).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Fused parameter -> the matrices of one expert that it holds, one below the other."""


def saved_views(name: str, tensor: torch.Tensor, stored: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, view of `tensor`) of everything that a checkpoint with the tensors `stored` holds for the parameter `name`.

    That is the parameter itself, unless it is one of fused experts and is not stored as such.
    """
    match = _EXPERTS.fullmatch(name)
    if match is None or tensor.dim() != 3 or name in stored:
        yield name, tensor
        return
    parts = _PARTS[match[2]]
    for index, expert in enumerate(tensor.unbind()):
        for part, view in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"{match[1]}.{index}.{part}.weight", view
