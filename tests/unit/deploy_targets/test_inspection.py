"""An artifact held against its fingerprint, without any engine: what is changed and sealed anew is found and named, in every format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy_targets.artifact import check_artifact
from deploy_targets.errors import ArtifactError, EngineError
from deploy_targets.inspection import Inspection, explained, inspect_artifact
from deploy_targets.probes import Probe, ProbeSet
from deploy_targets.profile import load_profile
from deploy_targets.types import TokenSequence
from hetero_rl.model import resolve_model
from tests import deploy_faults as faults

DEMO = resolve_model("demo")
PROBES = ProbeSet((Probe(TokenSequence(tuple(range(5, 25)), 10), np.zeros(10, np.float32), np.zeros(10, np.int32)),), 1.0, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def get(target: str) -> Path:
        if target not in folders:
            folders[target] = tmp_path_factory.mktemp("inspected") / target
            faults.make_artifact(load_profile(target), DEMO, PROBES, folders[target])
        return folders[target]

    return get


@pytest.mark.parametrize(
    ("target", "fault", "problem"),
    [
        ("int4-vllm", faults.swap_scales, "model.layers.1.mlp.down_proj.weight: differs from what was exported"),
        ("int4-vllm", faults.wrong_group_size, "group size: 32 at export, 64 here"),
        ("int4-vllm", faults.add_zero_kv_scale, "model.layers.0.self_attn.attn.k_scale: is in the file and was not exported"),
        ("int4-vllm", faults.other_eos, "EOS id: 2 at export, 5 here (config.json: eos_token_id)"),
        ("int4-vllm", lambda folder: faults.quantize_head(folder, load_profile("int4-vllm"), DEMO), "lm_head.weight: is stored as U4"),
        ("q4_k_m-llamacpp", faults.flip_byte, ".1."),
        ("q4_k_m-llamacpp", faults.other_rope_theta, "rope theta: 10000.0 at export, 500000.0 here (model.gguf: qwen3.rope.freq_base)"),
        ("nf4-transformers", faults.flip_byte, ".1."),
    ],
)
def test_what_was_changed_is_named(
    target: str, fault: Callable[[Path], None], problem: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    assert inspect_artifact(made(target), check_artifact(made(target)), PROBES).problems == []
    folder = Path(shutil.copytree(made(target), tmp_path / "a"))
    fault(folder)
    with pytest.raises(ArtifactError):
        check_artifact(folder)
    faults.reseal(folder)
    inspection = inspect_artifact(folder, check_artifact(folder), PROBES)
    assert any(problem in line for line in inspection.problems), inspection.problems
    assert len(inspection.problems) <= 4
    with pytest.raises(ArtifactError, match="it died\nThe artifact is not what was exported"), explained(inspection):
        raise EngineError("it died")


def test_errors_of_a_sound_artifact_stay_as_they_are() -> None:
    with pytest.raises(EngineError, match="it died"), explained(Inspection()):
        raise EngineError("it died")
