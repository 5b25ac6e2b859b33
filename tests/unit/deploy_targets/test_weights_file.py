"""The file of weights: what it refuses, in every dtype, wherever it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploy_targets.errors import WeightsError
from deploy_targets.weights_file import write_weights

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (dtype, float(value))
        for dtype in FLOATS
        for value in ("nan", "-nan", "inf", "-inf")
        if dtype != torch.float8_e4m3fn or "nan" in value
    ],
)
@pytest.mark.parametrize("place", [0, 500, 998])
def test_a_tensor_that_is_not_finite_is_named_and_no_file_is_left(dtype: torch.dtype, value: float, place: int, tmp_path: Path) -> None:
    tensor = torch.linspace(-400, 400, 999)
    tensor[place] = value
    given = tensor.to(dtype)
    assert not torch.isfinite(given.float()).all()
    with pytest.raises(WeightsError, match="'bad'"):
        write_weights(tmp_path / "x.safetensors", [("good", torch.ones(2)), ("bad", given.view(27, 37))], 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.uint8, torch.int32, torch.int64])
def test_finite_tensors_and_empty_ones_are_written(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "x": torch.arange(-100, 100).clamp(min=0 if dtype == torch.uint8 else -100).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    write_weights(tmp_path / "x.safetensors", tensors.items(), 4)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in tensors.items())
