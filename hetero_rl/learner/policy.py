"""The policy: a transformers causal LM, asked only for what the loss reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deploy_targets.quantizers.kv_cache import CacheRounding
from deploy_targets.routers import find_routers
from hetero_rl.algorithm.corrections import mean_score
from hetero_rl.algorithm.kinds import Bounds, Centered, GreyBoxForm
from hetero_rl.algorithm.signals import grey_box_cost
from hetero_rl.learner.attention import packed_arguments
from hetero_rl.learner.batching import MicroBatch
from hetero_rl.learner.fake_quant import TwinLayer, twin
from hetero_rl.learner.routing import routed, router_agreement


class TokenStats(NamedTuple):
    """Per response token: `logp`, with gradient; `entropy` and `greedy`, without; where asked, `twin_cost` and `mean_score`, with gradient.

    float32 [num_tokens] in nats, `greedy` int64 [num_tokens]. `router_agreement`, where the batch has routes: of the token that
    predicts it, the share of layers whose router chose the engine's experts. Where asked, the most probable tokens, falling and without
    gradient: `top_ids` int64 [num_tokens, k], `top_logps` float32 [num_tokens, k].
    """

    logp: Tensor
    entropy: Tensor
    greedy: Tensor
    twin_cost: Tensor | None = None
    mean_score: Tensor | None = None
    router_agreement: Tensor | None = None
    top_ids: Tensor | None = None
    top_logps: Tensor | None = None


class Beside(NamedTuple):
    """What the twin is run for beside the learner: the grey box's cost, score centering, or both; for neither it is not run."""

    grey_box: GreyBoxForm | None = None
    centering: tuple[Centered, Bounds] | None = None


NOTHING = Beside()


class Policy(nn.Module):
    """Log-probs of response tokens, logits in chunks, the grey box's cost beside them."""

    lm: Any

    def __init__(
        self,
        lm: nn.Module,
        twins: list[TwinLayer],
        chunk_elements: int,
        cache_rounding: CacheRounding | None = None,
        *,
        routing_replay: bool = False,
    ) -> None:
        """`lm` is a transformers causal LM whose quantized layers are `twins`; see `LearnerConfig.logit_chunk_elements`.

        `cache_rounding`: what the target's KV cache does, which the twin does as well. `routing_replay`: learner and twin follow the
        routes of a batch that has some; without, the learner's own are only held against them.
        """
        super().__init__()
        self.routers, self.routing_replay = find_routers(lm), routing_replay
        self.lm = lm
        self.twins = twins
        self.chunk_elements = chunk_elements
        self.cache_rounding = cache_rounding

    def forward(
        self, batch: MicroBatch, temperature: float, beside: Beside = NOTHING, as_twin: bool = False, num_top: int = 0
    ) -> TokenStats:
        """Statistics of the response tokens of `batch`, at the rollout temperature; with the `num_top` most probable tokens of each.

        `as_twin` runs the fake-quantized twin in place of the learner; `beside` asks for what needs the other of the two as well (a
        second forward pass, with a backward pass for the grey box alone).
        """
        targets = batch.targets
        hidden, agreement = self._hidden(batch, as_twin)
        other = None
        if beside != NOTHING:
            with torch.set_grad_enabled(torch.is_grad_enabled() and beside.grey_box is not None):
                other, _ = self._hidden(batch, not as_twin)
        chunk = max(1, self.chunk_elements // int(self.lm.config.vocab_size))
        parts = []
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            arguments = (hidden[part], None if other is None else other[part], targets[part], temperature, beside, as_twin, num_top)
            # One chunk keeps its logits for the backward pass; several would keep all of them, so they are recomputed.
            keep = len(targets) <= chunk or not torch.is_grad_enabled()
            parts.append(self._token_stats(*arguments) if keep else checkpoint(self._token_stats, *arguments, use_reentrant=False))
        stats = TokenStats._make(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        return stats._replace(router_agreement=agreement)

    def _hidden(self, batch: MicroBatch, as_twin: bool) -> tuple[Tensor, Tensor | None]:
        """The last hidden states that predict the response tokens, [num_tokens, hidden_size], and their `router_agreement`."""
        arguments = {} if batch.packing is None else {"position_ids": batch.position_ids, **packed_arguments(batch.packing)}
        if as_twin and self.cache_rounding is not None:
            arguments["cache_rounding"] = self.cache_rounding
        routes = routed(self.routers, batch.routes, replay=self.routing_replay)
        with twin(self.twins if as_twin else []), routes as agreed:
            hidden: Tensor = self.lm.base_model(input_ids=batch.input_ids, use_cache=False, **arguments).last_hidden_state
        # In float32, because the last token of a shared prompt stands for all its responses; `embedding` gathers, and backward in parallel.
        of_places = nn.functional.embedding(batch.places, hidden.flatten(0, 1).float()).to(hidden.dtype)
        return of_places, router_agreement(agreed, batch.places)

    def _logits(self, hidden: Tensor, temperature: float, as_twin: bool) -> Tensor:
        with twin(self.twins if as_twin else []):
            logits: Tensor = self.lm.get_output_embeddings()(hidden).float()
        return logits if temperature == 1.0 else logits / temperature

    def _token_stats(
        self, hidden: Tensor, other: Tensor | None, targets: Tensor, temperature: float, beside: Beside, as_twin: bool, num_top: int
    ) -> TokenStats:
        logits = self._logits(hidden, temperature, as_twin)
        logp_all = torch.log_softmax(logits, dim=-1)
        logp = logp_all.gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(logp_all.exp() * logp_all).sum(dim=-1)
            greedy = logits.argmax(dim=-1)
        stats = TokenStats(logp, entropy, greedy)
        if num_top:
            top = logp_all.detach().topk(min(num_top, logp_all.shape[-1]), dim=-1)
            stats = stats._replace(top_ids=top.indices, top_logps=top.values)
        if other is None:
            return stats
        other_logp = torch.log_softmax(self._logits(other, temperature, not as_twin), dim=-1)
        if beside.centering is not None:
            stats = stats._replace(mean_score=mean_score(logp_all, other_logp.detach(), *beside.centering))
        if beside.grey_box is not None:
            twin_logp, learner_logp = (logp_all, other_logp) if as_twin else (other_logp, logp_all)
            stats = stats._replace(twin_cost=grey_box_cost(beside.grey_box, twin_logp, learner_logp, targets))
        return stats
