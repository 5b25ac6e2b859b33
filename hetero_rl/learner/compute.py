"""The arithmetic that the learner's bf16 weights are used in: bf16, or float32 on CPUs whose bf16 products are not the faster ones.

Some CPUs multiply bf16 matrices no faster than float32 ones, and bf16 rounds every activation in between besides
(`benchmarks/arithmetic.py`). The weights that are trained and published are bf16 either way.
"""

from __future__ import annotations

import time
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from deploy_targets.errors import UsageError

ComputeDtype = Literal["auto", "bfloat16", "float32"]

_16_BITS = (torch.bfloat16, torch.float16)
CLEARLY_FASTER = 1.5
"""bf16 products must be this much faster before their coarser rounding is taken; a margin, so that noise decides nothing."""


def choose_dtype(asked: ComputeDtype, lm: nn.Module) -> torch.dtype:
    """`auto` is float32 on a CPU where bf16 products are not clearly faster, for models of linear layers, embeddings and RMSNorms.

    Everywhere else it is bfloat16. A run keeps what it began with: checkpoints hold the choice.

    Raises:
        UsageError: float32 was asked for, and some layers of the model cannot mix it with bf16 weights.
    """
    others = _layers_of_one_dtype(lm)
    if asked == "float32" and others:
        raise UsageError(
            f"learner.compute_dtype = 'float32' needs layers that accept float32 activations beside bf16 weights; these do not: "
            f"{', '.join(others)}. Use 'auto' or 'bfloat16'"
        )
    if asked == "auto":
        in_float32 = not torch.cuda.is_available() and not others and bf16_speedup() < CLEARLY_FASTER
        return torch.float32 if in_float32 else torch.bfloat16
    return torch.float32 if asked == "float32" else torch.bfloat16


def bf16_speedup() -> float:
    """How much faster this CPU multiplies two matrices in bf16 than in float32, now: the best of five each, in turns."""
    rows, columns = torch.ones(1024, 1024), torch.ones(1024, 512)
    seconds = {dtype: float("inf") for dtype in (torch.bfloat16, torch.float32)}
    for _ in range(6):
        for dtype in seconds:
            left, right = rows.to(dtype), columns.to(dtype)
            start = time.perf_counter()
            left @ right
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def compute_in_float32(lm: Any) -> None:
    """Let the bf16 model compute in float32, in place: the embedding hands out float32, and every layer follows its input."""
    for name, module in list(lm.named_modules()):
        if type(module) is nn.Linear:
            lm.set_submodule(name, FollowingLinear.around(module))
    lm.get_input_embeddings().register_forward_hook(_to_float32)


class FollowingLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever its weight is stored in."""

    @classmethod
    def around(cls, linear: nn.Linear) -> Self:
        """Share the parameters of `linear`, which this layer replaces under the same names."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def active_weight(self) -> Tensor:
        """The weight to compute with."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """X @ W.T + b."""
        bias: Tensor | None = self.bias
        return nn.functional.linear(input, self.active_weight().to(input.dtype), None if bias is None else bias.to(input.dtype))


class Float32Arithmetic(TorchFunctionMode):
    """Inside this context everything is computed in float32, from weights that stay in 16 bits: each is widened where it is used.

    For measuring: no gradient, and no second copy of the model. It knows no layer by name, so it holds for every family.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with float32 in place of every 16-bit tensor and dtype."""
        kwargs = kwargs or {}
        if _computes_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        if func is nn.functional.embedding:  # the rows alone: a table may hold most of a small model's weights
            return func(*args, **kwargs).float()
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs))


_MOVES = frozenset({
    "__get__", "__set__", "__delete__", "__getitem__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "cat", "chunk",
    "clone", "contiguous", "cpu", "cuda", "detach", "empty", "empty_like", "expand", "flatten", "narrow", "new_empty", "permute", "reshape",
    "split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "zeros",
})  # fmt: skip


def _computes_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Calls that read, make, change, move or send a tensor itself, and are given it as it is: a changed copy would be lost.

    DeepSpeed's ZeRO-3 hooks run in here too: what they gather has to arrive in the very weights, and stay in their dtype.
    """
    name = str(getattr(func, "__name__", ""))
    is_in_place = name.endswith("_") and not name.endswith("__")
    is_sent = str(getattr(func, "__module__", "")).startswith("torch.distributed")
    return name in _MOVES or is_in_place or is_sent or (name == "to" and not _changes_dtype(*args, **kwargs))


def _changes_dtype(tensor: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether `tensor.to(...)` gives another dtype: of all its arguments, a dtype or a tensor that has one says so."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype | Tensor)]
    return any((value if isinstance(value, torch.dtype) else value.dtype) != tensor.dtype for value in given)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _16_BITS else value
    return torch.float32 if isinstance(value, torch.dtype) and value in _16_BITS else value


def _to_float32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


def _layers_of_one_dtype(lm: nn.Module) -> list[str]:
    """Kinds of layers with parameters of their own that are not known to mix dtypes."""
    kinds = {type(module).__name__ for module in lm.modules() if list(module.parameters(recurse=False)) and not _mixes(module)}
    return sorted(kinds)


def _mixes(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Embedding) or type(module).__name__.endswith("RMSNorm")
