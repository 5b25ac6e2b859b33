"""All that can be told without the problems is told at once."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from deploy_targets.errors import PreflightError, UsageError
from deploy_targets.profile import EngineSpec, load_profile
from hetero_rl import inputs
from hetero_rl.config import load_config
from hetero_rl.inputs import check_inputs, missing_packages
from tests.conftest import TinyModels


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither DeepSpeed nor what exports ONNX graphs is installed."""
    absent = ("deepspeed", "tensorboard", "onnx_ir")
    monkeypatch.setattr(inputs, "find_spec", lambda name: None if name in absent else find_spec(name))


@pytest.mark.usefixtures("bare")
def test_packages_that_training_lacks_are_listed_by_their_extra() -> None:
    train = "needs 'deepspeed', 'tensorboard'; install it with: pip install 'hetero-rl[train]'"
    (line,) = missing_packages(load_profile("int4-vllm"))
    assert train in line
    assert [train in line or "'onnx_ir'; install it with: pip install 'hetero-rl[onnx-export]'" in line
            for line in missing_packages(load_profile("int4-onnx"))] == [True, True]  # fmt: skip


@pytest.mark.usefixtures("bare")
def test_packages_machine_model_options_and_lengths_are_one_error(tiny_models: TinyModels) -> None:
    model = tiny_models("qwen3", hidden_size=112, intermediate_size=208, head_dim=28)
    config, _ = load_config([], [f"model.path={model}", "loop.max_response_tokens=5000"], "fake")
    profile = load_profile("int4-vllm")
    hardware = profile.hardware.model_copy(update={"packages": ("no_such_runtime",)})
    engine = EngineSpec(name="vllm", process="own", options={"speed": 3})
    with pytest.raises(PreflightError) as caught:
        check_inputs(config, profile.model_copy(update={"hardware": hardware, "engine": engine}))
    text = "\n".join(caught.value.offenders)
    for fragment in ("'deepspeed'", "'no_such_runtime'", "speed: unknown key", "model.layers.1.mlp.down_proj", "5001 tokens"):
        assert fragment in text


@pytest.mark.usefixtures("bare")
def test_a_model_that_is_not_there_hides_nothing_else(tmp_path: Path) -> None:
    config, profile = load_config([], [f"model.path={tmp_path / 'nowhere'}"], "fake")
    with pytest.raises(PreflightError) as caught:
        check_inputs(config, profile)
    assert "no such folder" in caught.value.offenders[0]
    assert "'deepspeed'" in caught.value.offenders[1]


def test_a_model_that_is_not_there_is_the_error_where_all_else_fits(tmp_path: Path) -> None:
    config, profile = load_config([], [f"model.path={tmp_path / 'nowhere'}"], "fake")
    with pytest.raises(UsageError, match="no such folder"):
        check_inputs(config, profile)


def test_nothing_heavy_is_imported_to_refuse_a_target() -> None:
    code = (
        "import sys\nfrom hetero_rl.inputs import check_inputs\nfrom hetero_rl.config import load_config\n"
        "from deploy_targets.errors import PreflightError\n"
        "try:\n    check_inputs(*load_config([], ['loop.max_response_tokens=5000'], 'fake'))\n"
        "except PreflightError:\n    print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
