"""The learner's attention on a CPU: causal, for short sequences, and for packed batches in which responses share their prompt.

torch's fused CPU attention is slow in the backward pass for the short sequences of many RL tasks: at 256 x 72 tokens plain
fp32 batched products take less than half of its time, and their rounding error is smaller (`benchmarks/attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from deploy_targets.quantizers.kv_cache import CacheRounding
from hetero_rl.learner.straight_through import straight_through

NAME = "short_causal"
LONGEST = 128
"""Beyond this length the scores no longer fit the cache and the fused kernel wins (`benchmarks/attention.py`)."""
LONGEST_PACKED = 256
"""Sequences up to this length share their prompts in packed batches; the rest of the model then computes each prompt once."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Attention rows of one kind, padded to one shape.

    `queries`: int64 [num_rows, num_queries], `keys`: int64 [num_rows, num_keys], places of tokens in the packed row.
    `mask`: float32 [num_rows, 1, num_queries, num_keys], 0 where a query sees a key, else -inf.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


@dataclass(slots=True)
class Packing:
    """Who sees whom in a packed row of tokens: prompts see themselves, responses their prompt and themselves.

    `places`: int64 [num_tokens], where each token's output lies among the outputs of all `rows`. `num_layers_used` counts the
    attention layers that followed this packing.
    """

    rows: tuple[Rows, ...]
    places: Tensor
    num_layers_used: int = 0


class ResponseSpan(NamedTuple):
    """Where a response and its prompt stand in a packed row; `length` may be 0, for a response of one token."""

    prompt_start: int
    prompt_length: int
    start: int
    length: int


def pack(prompts: Sequence[tuple[int, int]], responses: Sequence[ResponseSpan], num_tokens: int, device: torch.device) -> Packing:
    """The packing of a row of `num_tokens` tokens; `prompts` are (start, length)."""
    of_prompts = [(np.arange(start, start + length), np.arange(start, start + length)) for start, length in prompts]
    of_responses = []
    for span in responses:
        if span.length > 0:
            own = np.arange(span.start, span.start + span.length)
            prompt = np.arange(span.prompt_start, span.prompt_start + span.prompt_length)
            of_responses.append((own, np.concatenate([prompt, own])))
    places = np.zeros(num_tokens, np.int64)
    blocks, offset = [], 0
    for kind in (of_prompts, of_responses):
        if kind:
            block, num_outputs = _rows(kind, places, offset, device)
            blocks.append(block)
            offset += num_outputs
    return Packing(tuple(blocks), torch.from_numpy(places).to(device))


def _rows(
    kind: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], places: NDArray[np.int64], offset: int, device: torch.device
) -> tuple[Rows, int]:
    """Pad (queries, keys) of each row; note in `places` where outputs will lie. Padding points at token 0 and is read by nobody."""
    num_queries, num_keys = max(len(queries) for queries, _ in kind), max(len(keys) for _, keys in kind)
    all_queries = np.zeros((len(kind), num_queries), np.int64)
    all_keys = np.zeros((len(kind), num_keys), np.int64)
    ahead = np.zeros((len(kind), 1, 1, 1), np.int64)
    for row, (queries, keys) in enumerate(kind):
        all_queries[row, : len(queries)] = queries
        all_keys[row, : len(keys)] = keys
        ahead[row] = len(keys) - len(queries)
        places[queries] = offset + row * num_queries + np.arange(len(queries))
    hidden = np.arange(num_keys) > np.arange(num_queries)[:, None] + ahead
    mask = np.where(hidden, np.float32("-inf"), np.float32(0))
    tensors = (torch.from_numpy(array).to(device) for array in (all_queries, all_keys, mask))
    return Rows(*tensors), all_queries.size


def register() -> str:
    """Make the function known to transformers; returns the name to give as `attn_implementation`."""
    AttentionInterface.register(NAME, short_causal_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def follows_packing(lm: Any) -> bool:
    """Whether a packed row gives this model's own hidden states: tried out on a prompt of two tokens with two responses.

    Every layer must have asked for attention of the kind that is packed, and nothing else may mix tokens (a convolution).
    """
    base, config = lm.base_model, lm.config
    if config._attn_implementation != NAME or torch.cuda.is_available() or "position_ids" not in signature(base.forward).parameters:
        return False
    tokens = torch.arange(8) % min(8, int(config.vocab_size))
    row, positions = tokens[None], torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4]])
    packing = pack([(0, 2)], [ResponseSpan(0, 2, 2, 3), ResponseSpan(0, 2, 5, 3)], 8, torch.device("cpu"))
    with torch.no_grad():
        plain = [base(input_ids=row[:, places], use_cache=False).last_hidden_state[0] for places in ([0, 1, 2, 3, 4], [0, 1, 5, 6, 7])]
        try:
            together = base(input_ids=row, position_ids=positions, use_cache=False, **packed_arguments(packing)).last_hidden_state[0]
        except (TypeError, ValueError, RuntimeError):
            return False  # a model that does not know the argument
    apart = torch.cat([plain[0], plain[1][2:]])
    error = (together - apart).norm() / apart.norm()
    return packing.num_layers_used == config.num_hidden_layers and bool(error < (1e-4 if apart.dtype == torch.float32 else 0.02))


def follows_cache_rounding(lm: Any) -> bool:
    """Whether a `cache_rounding` handed to this model arrives at each of its attention layers: tried out with one that counts."""
    used = []

    def count(heads: Tensor) -> Tensor:
        used.append(heads)
        return heads

    with torch.no_grad():
        try:
            ids = torch.arange(4, device=lm.get_input_embeddings().weight.device)[None] % int(lm.config.vocab_size)
            lm.base_model(input_ids=ids, use_cache=False, cache_rounding=count)
        except TypeError:
            return False  # a model that does not know the argument
    return len(used) == 2 * int(lm.config.num_hidden_layers)


def packed_arguments(packing: Packing) -> dict[str, Any]:
    """What a model's forward pass is given so that its attention follows `packing`."""
    # A four-dimensional mask is handed on as it is; without one transformers would build [num_tokens, num_tokens].
    return {"attention_mask": torch.zeros((1, 1, 1, 1)), "packing": packing}


def short_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    cache_rounding: CacheRounding | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T / sqrt(d)) V under a causal mask; scores in fp32.

    Args:
        module: The attention layer that asks.
        query: [batch, num_heads, length, head_dim].
        key: [batch, num_kv_heads, length, head_dim]; each serves num_heads / num_kv_heads query heads.
        value: Like `key`.
        attention_mask: None for plain causal attention; anything else goes to torch's fused kernel, as do long sequences,
            decoding with a cache and sliding windows shorter than the sequences. Not read for a packed batch.
        scaling: Factor of the scores; None is 1 / sqrt(head_dim).
        dropout: Not applied; the learner trains without.
        packing: Of a packed batch.
        cache_rounding: What the target's KV cache makes of keys and values; gradients pass straight through.
        **kwargs: The rest of transformers' interface.

    Returns:
        [batch, length, num_heads, head_dim] in the dtype of `query`, and no attention weights.
    """
    if cache_rounding is not None:
        key, value = (straight_through(heads, cache_rounding) for heads in (key, value))
    length = query.shape[2]
    # Whether packed batches are followed is found out once, on a short one: for all that may come.
    longest = length if packing is None else LONGEST_PACKED
    window = kwargs.get("sliding_window")
    plain = (window is None or longest <= window) and not kwargs.get("softcap") and kwargs.get("s_aux") is None
    plain = plain and value.shape[-1] == query.shape[-1]
    if packing is not None and plain:
        packing.num_layers_used += 1
        return _packed_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, packing), None
    if attention_mask is not None or key.shape[2] != length or length > LONGEST or not plain or query.device.type != "cpu":
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return out, None
    mask = torch.full((length, length), float("-inf"), device=query.device).triu(1)
    return _attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, mask).transpose(1, 2), None


def _packed_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, packing: Packing) -> Tensor:
    """[1, num_tokens, num_heads, head_dim]: the rows of `packing` one kind after the other, then every token at its place."""
    num_heads, head_dim = query.shape[1], query.shape[3]

    def gathered(heads: Tensor, places: Tensor) -> Tensor:
        # In float32, because a prompt's gradient is the sum over its responses; `embedding` gathers, and backward in parallel.
        table = heads[0].transpose(0, 1).flatten(1).float()
        return functional.embedding(places, table).view(*places.shape, -1, head_dim).transpose(1, 2)

    outputs = []
    for rows in packing.rows:
        q, k, v = gathered(query, rows.queries), gathered(key, rows.keys), gathered(value, rows.keys)
        outputs.append(_attend(q, k, v, scaling, rows.mask).transpose(1, 2).reshape(-1, num_heads * head_dim))
    return functional.embedding(packing.places, torch.cat(outputs)).view(1, -1, num_heads, head_dim).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor) -> Tensor:
    """[num_rows, num_heads, num_queries, head_dim] by plain fp32 products; `mask` broadcasts to [num_rows, 1, num_queries, num_keys]."""
    num_rows, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    group = num_heads // num_kv_heads
    rows = (query.float() * scaling).reshape(num_rows * num_kv_heads, group * num_queries, head_dim)
    columns = key.float().reshape(num_rows * num_kv_heads, num_keys, head_dim)
    scores = torch.bmm(rows, columns.transpose(1, 2))
    scores.view(num_rows, num_kv_heads * group, num_queries, num_keys).add_(mask)
    out = torch.bmm(scores.softmax(dim=-1), value.float().reshape(num_rows * num_kv_heads, num_keys, head_dim))
    return out.reshape(num_rows, num_heads, num_queries, head_dim).to(query.dtype)
