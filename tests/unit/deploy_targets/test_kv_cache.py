"""Keys and values in FP8: against a search over the grid, and against a real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deploy_targets.catalog import make_quantizer, open_engine
from deploy_targets.hardware import find_gpus
from deploy_targets.profile import load_profile
from deploy_targets.quantizers.kv_cache import cache_rounding, cut_float8, round_float8
from deploy_targets.types import TokenSequence
from deploy_targets.weights_file import weights_name, write_version
from hetero_rl.model import resolve_model
from hetero_rl.publish import probabilities
from tests.learners import unconstrained


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(300, generator=generator) * 0.01
    return torch.cat([torch.randn(300, generator=generator) * 3, small, torch.tensor([0.0, 1e9, -1e9, 2**-6, 2**-9, -(2**-10)])])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_against_a_search_over_the_grid(dtype: str) -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype)).float()
    grid = grid[grid.isfinite()]
    given = values().to(torch.bfloat16).float()
    nearest, cut = round_float8(given, dtype), cut_float8(given, dtype)
    bounded = given.clamp(grid.min(), grid.max())
    assert torch.equal((bounded - nearest).abs(), (bounded[:, None] - grid).abs().amin(-1))
    below = torch.where(grid.abs() <= bounded.abs()[:, None], grid.abs(), 0.0).amax(-1)
    assert torch.equal(cut, below * bounded.sign())


def test_caches_that_hold_what_they_are_given() -> None:
    assert cache_rounding(load_profile("int4-vllm")) is None
    assert cache_rounding(load_profile("q4_0-llamacpp")) is None


def test_the_engine_reads_what_the_twin_reads(tmp_path: Path) -> None:
    """vLLM with an FP8 cache agrees with the twin much better than with the learner, and than with the other way of rounding."""

    profile, model_dir = load_profile("bf16-vllm-fp8kv"), resolve_model("demo")
    quantizer = make_quantizer(profile, model_dir)
    learner = unconstrained(model_dir, quantizer, cache_rounding(profile))
    generator = np.random.default_rng(0)
    sequences = [TokenSequence(tuple(generator.integers(20, 60, 24).tolist()), 4) for _ in range(40)]
    folder = tmp_path / "serving"
    folder.mkdir()
    write_version(folder / weights_name(quantizer), quantizer, learner.named_tensors(), model_dir, num_tensors_max=1000)
    quantizer.scaffold(model_dir, folder)
    engine = open_engine(profile, folder, 0)
    try:
        served = probabilities(engine.score(sequences))
    finally:
        engine.close()

    def gap(**options: bool) -> float:
        return float(np.abs(probabilities(learner.score(sequences, **options)) - served).mean())

    twin, plain = gap(as_twin=True), gap(as_twin=False)
    learner.policy.cache_rounding = lambda heads: (cut_float8 if find_gpus() else round_float8)(heads, "float8_e4m3fn")
    other = gap(as_twin=True)
    learner.close()
    assert twin < 0.5 * plain
    assert twin < 0.5 * other
