"""llama.cpp's C interface (llama.h), as llama-cpp-python declares it, behind numpy arrays: a model, and contexts that decode with it."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from deploy_targets.errors import EngineError

CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
"""Name of a key-value cache's dtype -> its ggml type."""
_WARNING, _ERROR, _CONTINUED = 2, 3, 5
_log_lines: deque[str] = deque(maxlen=8)
_log_level = 0


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_warnings(level: int, text: bytes, user_data: object) -> None:
    """llama.cpp reports everything on stderr otherwise; its last warnings and errors go into ours."""
    global _log_level
    _log_level = _log_level if level == _CONTINUED else level
    if _log_level in (_WARNING, _ERROR) and text.strip(b".\n "):
        _log_lines.append(text.decode("utf-8", errors="replace").rstrip())


def failure(what: str) -> EngineError:
    """The error that says `what` failed, with llama.cpp's last warnings and errors."""
    lines = "\n".join(f"  {line}" for line in _log_lines)
    return EngineError(f"llama.cpp {what}." + (f" Its last messages:\n{lines}" if lines else " It said nothing."))


class Model:
    """The weights of one GGUF file, shared by all contexts."""

    def __init__(self, path: Path, num_gpu_layers: int) -> None:
        """Open `path`. Raises `EngineError` when llama.cpp refuses it."""
        llama_cpp.llama_log_set(_keep_warnings, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _log_lines.clear()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = num_gpu_layers
        self.pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise failure(f"cannot load {path}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.pointer))

    def close(self) -> None:
        """Give the weights back; no context may be open."""
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)
            self.pointer = None


@dataclass(frozen=True, slots=True)
class ContextSize:
    """How much a context holds and how it computes."""

    num_slots: int
    """Sequences that it holds at a time."""
    max_model_len: int
    """Tokens of the longest one."""
    batch_tokens: int
    """Tokens of one pass."""
    num_threads: int
    """Threads of one pass."""
    cache_type: int
    """ggml type of keys and values."""
    flash_attention: bool
    """Attention in one operator, which on a CPU sums values in float16."""


class Context:
    """A key-value cache of `num_slots` sequences, each in a stream of its own, and the buffers of a pass."""

    def __init__(self, model: Model, size: ContextSize) -> None:
        """Raises `EngineError` when llama.cpp cannot make the context, e.g. for lack of memory."""
        self.size, self.vocab_size = size, model.vocab_size
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = size.num_slots * size.max_model_len
        parameters.n_seq_max = size.num_slots
        parameters.n_batch = parameters.n_ubatch = size.batch_tokens
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = 0  # as many as a pass has tokens
        parameters.n_threads = parameters.n_threads_batch = size.num_threads
        parameters.type_k = parameters.type_v = size.cache_type
        parameters.flash_attn_type = int(size.flash_attention)
        parameters.kv_unified = False
        parameters.no_perf = True
        self.pointer = llama_cpp.llama_init_from_model(model.pointer, parameters)
        if not self.pointer:
            raise failure(f"cannot make a context of {size.num_slots} sequences of {size.max_model_len} tokens")
        self._memory = llama_cpp.llama_get_memory(self.pointer)

    def clear(self) -> None:
        """Forget every sequence."""
        llama_cpp.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source`, by its whole stream of the cache."""
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def drop(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def feed(self, tokens: NDArray[Any], positions: NDArray[Any], slots: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.float32]:
        """Append tokens to the sequences in `slots`, at most `batch_tokens` of them; logits [num_wanted, vocab] after the `wanted` ones.

        The four arrays have one entry per token; a slot's positions are consecutive. The result is overwritten by the next call.
        Raises `EngineError` when llama.cpp fails.
        """
        num_tokens = len(tokens)
        assert num_tokens <= self.size.batch_tokens
        ids, places, owners = (np.ascontiguousarray(column, np.int32) for column in (tokens, positions, slots))
        flags, ones = np.ascontiguousarray(wanted, np.int8), np.ones(num_tokens, np.int32)
        pointers = (owners.ctypes.data + owners.itemsize * np.arange(num_tokens)).astype(np.uintp)
        int32_pointer = ctypes.POINTER(ctypes.c_int32)
        batch = llama_cpp.llama_batch(
            n_tokens=num_tokens,
            token=ids.ctypes.data_as(int32_pointer),
            pos=places.ctypes.data_as(int32_pointer),
            n_seq_id=ones.ctypes.data_as(int32_pointer),
            seq_id=pointers.ctypes.data_as(ctypes.POINTER(int32_pointer)),
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        code = llama_cpp.llama_decode(self.pointer, batch)
        if code != 0:
            self.clear()
            raise failure(f"failed to decode {num_tokens} tokens (code {code})")
        num_wanted = int(np.count_nonzero(flags))
        if num_wanted == 0:
            return np.empty((0, self.vocab_size), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.pointer), (num_wanted, self.vocab_size))

    def close(self) -> None:
        """Give the cache back."""
        if self.pointer:
            llama_cpp.llama_free(self.pointer)
            self.pointer = None


def passes(lengths: Sequence[int], batch_tokens: int, num_slots: int) -> list[range]:
    """Neighbouring sequences that fit one pass of `batch_tokens` tokens and `num_slots` slots; a longer sequence is alone."""
    found: list[range] = []
    start = total = 0
    for i, length in enumerate(lengths):
        if i > start and (total + length > batch_tokens or i - start == num_slots):
            found.append(range(start, i))
            start, total = i, 0
        total += length
    return [*found, range(start, len(lengths))] if lengths else []
