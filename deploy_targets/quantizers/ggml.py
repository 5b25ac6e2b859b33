"""llama.cpp's own quantization code, through the C interface of the libggml that llama-cpp-python brings (ggml.h)."""

from __future__ import annotations

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, quant_shape_to_byte_shape, quants
from numpy.typing import NDArray

from deploy_targets.errors import EngineError, MissingPackageError, WeightsError

if TYPE_CHECKING:
    import torch

PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
}
"""Types without blocks that GGUF targets store, and what numpy calls them."""
_VALUES_PER_TASK = 1 << 19


def encode(name: str, weight: NDArray[np.float32], ggml_type: GGMLQuantizationType, num_threads: int = 1) -> NDArray[np.uint8]:
    """The bytes of `weight` [..., inputs] as `ggml_type`: uint8 [..., bytes of a row].

    They are what `llama-quantize` writes without an importance matrix.
    Rows are independent of each other, so `num_threads` share them. Raises `WeightsError` naming the tensor when it holds NaN
    or infinity, or values beyond the range of the scales.
    """
    if not np.isfinite(weight).all():
        raise WeightsError(f"tensor {name!r} holds NaN or infinity; it is not published. The learner has diverged: lower learner.lr")
    weight = np.ascontiguousarray(weight, np.float32)
    if ggml_type in PLAIN:
        with np.errstate(over="ignore"):
            plain: NDArray[Any] = weight.astype(PLAIN[ggml_type])
        if not np.isfinite(plain).all():
            raise WeightsError(f"tensor {name!r} holds values beyond the range of {ggml_type.name}; it is not published")
        raw: NDArray[np.uint8] = plain.view(np.uint8)
        return raw
    library = _library()
    data = np.empty(quant_shape_to_byte_shape(weight.shape, ggml_type), np.uint8)
    rows, row_bytes = weight.reshape(-1, weight.shape[-1]), data.reshape(-1, data.shape[-1])
    step = max(1, _VALUES_PER_TASK // rows.shape[1])

    def part(start: int) -> None:
        count = min(step, len(rows) - start)
        source, target = rows[start:].ctypes.data, row_bytes[start:].ctypes.data
        library.ggml_quantize_chunk(int(ggml_type), source, target, 0, count, rows.shape[1], None)

    starts = range(0, len(rows), step)
    if num_threads > 1 and len(starts) > 1:
        library.ggml_quantize_init(int(ggml_type))
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(part, starts))
    else:
        for start in starts:
            part(start)
    if not library.ggml_validate_row_data(int(ggml_type), data.ctypes.data, data.nbytes):
        raise WeightsError(f"tensor {name!r} holds values beyond the range of {ggml_type.name}'s scales; it is not published")
    return data


def decode(data: NDArray[np.uint8], ggml_type: GGMLQuantizationType) -> NDArray[np.float32]:
    """The float32 values [..., inputs] that the bytes [..., bytes of a row] of `ggml_type` stand for."""
    stored: NDArray[Any] = data.view(PLAIN[ggml_type]) if ggml_type in PLAIN else data
    values: NDArray[np.float32] = quants.dequantize(stored, ggml_type).astype(np.float32, copy=False)
    return values


def to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    """The float32 values of a tensor on any device."""
    values: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return values


@cache
def _library() -> ctypes.CDLL:
    # Found, not imported: that would load all of llama.cpp into the learner's process.
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise MissingPackageError("llama-cpp-python", "quantizing to GGUF", "llamacpp")
    folder = Path(package.origin).parent / "lib"
    found = next((path for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll") if (path := folder / name).is_file()), None)
    if found is None:
        raise EngineError(f"{folder} holds no libggml-base; install llama-cpp-python again, so that it builds its own llama.cpp")
    library = ctypes.CDLL(str(found))
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_init.argtypes, library.ggml_quantize_init.restype = [ctypes.c_int], None
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library
