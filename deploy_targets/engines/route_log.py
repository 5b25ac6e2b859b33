"""Which experts the tokens of a batch go to while transformers samples it: read off the routers by forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class RouteLog:
    """The routes of one batch of sequences, forward pass by forward pass: first their prompts, then one token of some of them at a time.

    Without `routers` nothing is watched, and no sequence has routes.
    """

    def __init__(self, routers: Sequence[nn.Module]) -> None:
        """`routers` as `find_routers` gives them."""
        self._routers = routers
        self._seen: list[Tensor] = []
        self._routes: list[list[NDArray[np.int16]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block, forward passes are seen; each one is to be booked before the next."""
        with ExitStack() as stack:
            for router in self._routers:
                stack.callback(router.register_forward_hook(self._see).remove)
            yield

    def _see(self, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._seen.append(output[2])

    def _taken(self) -> NDArray[np.int16]:
        """[num_tokens, num_layers, top_k] of the pass that was seen."""
        taken = torch.stack(self._seen, dim=1).to(torch.int16).cpu().numpy()
        self._seen = []
        return taken

    def book_prompts(self, mask: Tensor, rows: Tensor) -> None:
        """The pass read prompts, the tokens of [num_rows, length] that `mask` holds to be real; sequence i has the prompt in `rows[i]`."""
        if self._routers:
            routes = self._taken().reshape(*mask.shape, len(self._routers), -1)
            prompts = [row[real] for row, real in zip(routes, mask.bool().cpu().numpy(), strict=True)]
            self._routes = [[prompts[row]] for row in rows.tolist()]

    def book_tokens(self, sequences: Tensor) -> None:
        """The pass read one token of each of `sequences`, int64 [num_rows]."""
        if self._routers:
            for sequence, routes in zip(sequences.tolist(), self._taken(), strict=True):
                self._routes[sequence].append(routes[None])

    def routes(self, sequence: int) -> NDArray[np.int16] | None:
        """All that was booked for a sequence, int16 [num_inputs, num_layers, top_k]."""
        return np.concatenate(self._routes[sequence]) if self._routers else None
