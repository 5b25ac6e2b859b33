"""The file that holds one version of the weights: a safetensors file, unless the target has a format of its own.

A safetensors file is written tensor by tensor, so that a publish holds one layer and not the whole model. The header comes
first in the format but is known last; its room is reserved and filled with the spaces that the format allows
(https://github.com/huggingface/safetensors#format). Tensors of equal names, shapes and dtypes always land at equal offsets,
so that a graph may point into the file and outlive a version.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_targets.errors import WeightsError
from deploy_targets.gguf_file import GGUF_FILE
from deploy_targets.protocols import FileQuantizer, Quantizer
from deploy_targets.types import WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

WEIGHTS_FILES = (WEIGHTS_FILE, GGUF_FILE)
"""The names that the weights of an artifact may have; it has one of them."""
_HEADER_BYTES_PER_TENSOR = 224


def weights_name(quantizer: Quantizer) -> str:
    """The name of the file that holds the weights of this target."""
    return quantizer.weights_file if isinstance(quantizer, FileQuantizer) else WEIGHTS_FILE


def write_version(
    path: Path, quantizer: Quantizer, tensors: Iterable[tuple[str, torch.Tensor]], model_dir: Path, num_tensors_max: int
) -> None:
    """Quantize the checkpoint's `tensors` into the file `path`, in the format of the target.

    Raises what the quantizer raises, and what `write_weights` raises.
    """
    if isinstance(quantizer, FileQuantizer):
        quantizer.write(path, quantizer.quantize(tensors), model_dir)
    else:
        write_weights(path, quantizer.quantize(tensors), num_tensors_max)


def write_weights(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], num_tensors_max: int) -> None:
    """Stream `tensors` into the safetensors file `path`.

    The file appears under its name only when it is complete. Raises `WeightsError` for a non-finite tensor, before
    anything can load it, and for more than `num_tensors_max` tensors.
    """
    import torch

    dtype_names = {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
        torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
    }  # fmt: skip
    room = num_tensors_max * _HEADER_BYTES_PER_TENSOR
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    temporary = path.with_name(path.name + ".partial")
    offset = 0
    try:
        with open(temporary, "wb") as file:
            file.seek(8 + room)
            for name, tensor in tensors:
                flat = tensor.detach().cpu().contiguous()
                if not _is_finite(flat):
                    raise WeightsError(
                        f"tensor {name!r} holds NaN or infinity; it is not published. The learner has diverged: lower learner.lr"
                    )
                data = flat.reshape(-1).view(torch.uint8).numpy()
                header[name] = {"dtype": dtype_names[flat.dtype], "shape": list(flat.shape), "data_offsets": [offset, offset + data.nbytes]}
                file.write(data.data)
                offset += data.nbytes
            encoded = json.dumps(header, separators=(",", ":")).encode()
            if len(encoded) > room:
                raise WeightsError(f"{len(header) - 1} tensors need {len(encoded)} bytes of header, {room} were reserved")
            file.seek(0)
            file.write(room.to_bytes(8, "little") + encoded.ljust(room))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; several times faster than `torch.isfinite(tensor).all()`, which writes a mask."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # no infinity, and NaN is all ones but for the sign
        return int((tensor.view(torch.uint8) & 0x7F).amax()) != 0x7F
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))


def sha256_of(path: Path) -> str:
    """The sha256 of a file as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_layout(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Name -> (safetensors dtype, shape, offset in the file, length in bytes) of every tensor in a safetensors file."""
    with open(path, "rb") as file:
        room = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(room))
    base = 8 + room
    return {
        name: (entry["dtype"], tuple(entry["shape"]), base + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
