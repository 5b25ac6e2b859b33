"""What makes the suite of test_engines.py able to fail: its models show what is lost, and no target is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import deploy_targets
from deploy_targets.profile import shipped_profiles
from tests.conftest import TinyModels
from tests.contract import targets
from tests.contract.targets import biased_model, load_reference, mean_limit, model_logps, random_sequences, tolerance_of
from tests.contract.test_engines import FAMILIES, FP8_CACHES, TARGETS


@pytest.mark.parametrize("kind", ["q_proj.bias", "k_proj.bias", "v_proj.bias"])
@pytest.mark.parametrize("name", ["", *targets.BIASED_MODEL_OPTIONS])
def test_a_lost_bias_is_far_beyond_what_any_target_may_differ_by(kind: str, name: str, tiny_models: TinyModels) -> None:
    model, sequences = load_reference(biased_model(tiny_models, name)), random_sequences(8)
    whole = model_logps(model, sequences)
    lost = [parameter for key, parameter in model.named_parameters() if key.endswith(kind)]
    assert len(lost) == 2
    with torch.no_grad():
        for parameter in lost:
            parameter.zero_()
    largest_limit = max(mean_limit(tolerance_of(target)) for target in shipped_profiles())
    assert np.abs(model_logps(model, sequences) - whole).mean() > 4 * largest_limit


def test_no_shipped_target_is_left_out() -> None:
    shipped = {file.stem for file in (Path(deploy_targets.__file__).parent / "profiles").glob("*.toml")}
    named = {str(parameter.values[0]) for parameter in TARGETS}
    assert shipped <= named
    assert len(FP8_CACHES) == len([name for name in shipped if name.endswith("fp8kv")]) > 0


def test_what_is_said_of_single_targets_is_said_of_shipped_ones() -> None:
    said = {*targets.LOGP_TOLERANCE_NATS, *targets.MODEL_OPTIONS, *targets.BIASED_MODEL_OPTIONS, *FAMILIES}
    assert said <= set(shipped_profiles())
