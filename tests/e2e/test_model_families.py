"""Models of other families than the demo's, trained and exported by the command line. Tiny and random: they learn nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from deploy_targets.catalog import make_quantizer
from deploy_targets.profile import load_profile
from deploy_targets.types import WEIGHTS_FILE
from hetero_rl.metrics import read_metrics
from tests.command_line import SHORT_RUN, hetero_rl, with_settings
from tests.conftest import TinyModels

CONFIG = Path(__file__).parents[2] / "configs" / "demo.toml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen3_moe", "bf16-transformers"),
        pytest.param("phi3", "int4-vllm", marks=pytest.mark.variant),
        pytest.param("qwen3_moe", "bf16-vllm", marks=pytest.mark.variant),
    ],
)
def test_a_family_trains_and_exports(family: str, target: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    pytest.importorskip("vllm.version" if "vllm" in target else "transformers")
    model = tiny_models(family)
    settings = with_settings(*SHORT_RUN, f"model.path={model}", "learner.compute_dtype=auto")
    result = hetero_rl("train", "--target", target, "--config", CONFIG, *settings, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run")
    assert all(row["engine/nonfinite_logprobs"] == 0 for row in rows[1:])
    assert all(row["publish/proof_gap"] < 0.02 for row in rows[1:])
    assert rows[-1]["publish/rebuilds"] == 0
    with safe_open(model / WEIGHTS_FILE, "np") as source, safe_open(tmp_path / "run" / "artifact" / WEIGHTS_FILE, "np") as artifact:
        quantizer = make_quantizer(load_profile(target), model)
        whole = {name for name in source.keys() if not quantizer.quantizes(name)}  # noqa: SIM118 (not a dict)
        assert whole <= set(artifact.keys())


@pytest.mark.slow
def test_a_mixture_of_experts_trains_with_replayed_routes(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Rollouts of two versions of the weights, so that old log-probs are replayed as well; what ships says nothing of routes."""
    replayed = ("algorithm.routing_replay=true", "loop.publish_every=2", "learner.compute_dtype=auto")
    settings = with_settings(*SHORT_RUN, f"model.path={tiny_models('qwen3_moe')}", *replayed)
    result = hetero_rl("train", "--target", "bf16-transformers", "--config", CONFIG, *settings, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "routing replay" in result.stdout
    first, *rows = read_metrics(tmp_path / "run")
    assert all(0.5 < row["learner/router_agreement"] <= 1 for row in rows)
    assert all(row["constraint/engine_gap"] < 2 * first["constraint/floor"] for row in rows)
    assert "return_routes" not in (tmp_path / "run" / "artifact" / "manifest.json").read_text("utf-8")
    again = hetero_rl("export", "run", "--out", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
