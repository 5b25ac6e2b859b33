"""What a profile may say: settings that would be ignored are refused with the file."""

from __future__ import annotations

import pytest

from deploy_targets.errors import ProfileError
from deploy_targets.profile import parse_profile, profile_text, shipped_profiles


def with_threads(name: str, process: str) -> str:
    text = profile_text(name).replace('process = "own"\n', "").replace("[engine]\n", f'[engine]\nprocess = "{process}"\n')
    return text.replace("[engine.options]\n", "[engine.options]\nnum_threads = 1\n")


@pytest.mark.parametrize("name", ["bf16-transformers", "int4-vllm"])
def test_threads_of_an_engine_that_shares_its_process_are_refused(name: str) -> None:
    """The environment of a process of its own is where these engines take the number from."""
    assert parse_profile(with_threads(name, "own"), "mine.toml").engine.options["num_threads"] == 1
    with pytest.raises(ProfileError, match=r"engine: .*num_threads of .* has no effect in a shared process") as caught:
        parse_profile(with_threads(name, "shared"), "mine.toml")
    assert len(caught.value.offenders) == 1


def test_onnxruntime_takes_its_threads_in_a_shared_process() -> None:
    text = profile_text("int4-onnx").replace("[engine.options]\n", "[engine.options]\nnum_threads = 1\n")
    assert parse_profile(text, "mine.toml").engine.process == "shared"


def test_an_empty_list_of_ignored_modules_is_not_an_absent_one() -> None:
    assert shipped_profiles()["fake"].scheme.ignore is None
    text = profile_text("int4-vllm")
    assert parse_profile(text.replace('ignore = ["lm_head"]', "ignore = []"), "mine.toml").scheme.ignore == ()
    assert parse_profile(text.replace('ignore = ["lm_head"]', ""), "mine.toml").scheme.ignore is None
