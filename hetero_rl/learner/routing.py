"""Routing replay (R3, arXiv 2510.11370): the learner sends each token to the experts that it went to in the engine.

A router's choice is a step function: the engine's rounding tips some tokens over to other experts, and the two policies are then far
apart for reasons that no weight has. Replay takes the choice from the engine and everything else from the learner: the weights of the
chosen experts are the softmax of the learner's own router logits, and the gradient flows through them into its router.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploy_targets.errors import EngineError

NO_ROUTE = -1
"""In place of an expert: the token is padding, and the learner's own router decides."""


@contextmanager
def routed(routers: Sequence[nn.Module], routes: Tensor | None, *, replay: bool) -> Iterator[list[Tensor]]:
    """Within the block, forward passes are held against `routes` and, with `replay`, follow them.

    `routers` as `find_routers` gives them. `routes`: int64 [num_tokens, num_layers, top_k], the engine's experts for each token of the
    batch, row by row, or `NO_ROUTE`; None: nothing happens. The list handed out gets one tensor a layer: bool [num_tokens], whether the
    learner's own router chose the same set of experts. With `replay` that is its choice at the hidden states of the replayed layers below.
    """
    agreed: list[Tensor] = []
    with ExitStack() as stack:
        for layer, router in enumerate(routers if routes is not None else ()):
            assert routes is not None
            hook = partial(_follow if replay else _compare, routes[:, layer], agreed)
            stack.callback(router.register_forward_hook(hook).remove)
        yield agreed


def _compare(given: Tensor, agreed: list[Tensor], router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    agreed.append((output[2].sort(dim=-1).values == given.sort(dim=-1).values).all(dim=-1))


def _follow(
    given: Tensor, agreed: list[Tensor], router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    _compare(given, agreed, router, inputs, output)
    logits, weights, own = output
    experts = torch.where(given == NO_ROUTE, own, given)
    return logits, replayed_weights(logits, experts, normalized=router.norm_topk_prob).to(weights.dtype), experts


def replayed_weights(logits: Tensor, experts: Tensor, *, normalized: bool) -> Tensor:
    """By what the outputs of `experts` are weighed, float32 [num_tokens, top_k], with gradient into `logits` [num_tokens, num_experts].

    The softmax over all experts at the given ones; `normalized` (`norm_topk_prob`): the softmax over the given ones alone.
    """
    weights = logits.softmax(dim=-1, dtype=torch.float32).gather(-1, experts)
    return weights / weights.sum(dim=-1, keepdim=True) if normalized else weights


def router_agreement(agreed: Sequence[Tensor], places: Tensor) -> Tensor | None:
    """Share of layers whose router agrees with the engine, float32 [len(places)], at `places` among the tokens; None without routes."""
    return torch.stack(list(agreed)).float().mean(dim=0)[places] if agreed else None


def check_routes(routes: Sequence[NDArray[np.int16] | None], routers: Sequence[Any], *, replay: bool) -> None:
    """Raise `EngineError` for routes of another model than the learner's, and for missing ones with `replay`."""
    missing = sum(array is None for array in routes)
    if replay and missing:
        raise EngineError(
            f"algorithm.routing_replay: {missing} of {len(routes)} responses came without routes; use an engine that returns them, "
            "or set it to false"
        )
    num_experts, top_k = (routers[0].num_experts, routers[0].top_k) if routers else (0, 0)
    for array in routes:
        if array is not None and (array.shape[1:] != (len(routers), top_k) or array.min() < 0 or array.max() >= num_experts):
            raise EngineError(
                f"the engine returned routes of shape {list(array.shape)} through experts {array.min()} to {array.max()}; the learner has "
                f"{len(routers)} layers of {num_experts} experts, {top_k} for each token"
            )
