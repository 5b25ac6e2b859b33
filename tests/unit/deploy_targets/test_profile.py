"""What a profile may say: settings that would be ignored are refused with the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_targets.errors import ProfileError, UnknownNameError
from deploy_targets.profile import GateSpec, load_profile, parse_profile, profile_text, shipped_profiles


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


def test_a_profile_that_extends_another_gives_only_what_differs() -> None:
    mine = parse_profile('extends = "int4-vllm"\nname = "mine"\ndescription = "mine"\n[scheme]\ngroup_size = 64\n', "mine.toml")
    base = load_profile("int4-vllm")
    assert mine.scheme == base.scheme.model_copy(update={"group_size": 64})
    assert mine.model_copy(update={"name": base.name, "description": base.description, "scheme": base.scheme}) == base


def test_name_and_description_are_not_inherited() -> None:
    with pytest.raises(ProfileError) as caught:
        parse_profile('extends = "int4-vllm"', "mine.toml")
    assert [line.partition(":")[0] for line in caught.value.offenders] == ["name", "description"]


def test_extending_what_is_no_target_is_an_error_with_the_known_names() -> None:
    with pytest.raises(UnknownNameError, match="int4-vllm"):
        parse_profile('extends = "int4-vlm"', "mine.toml")


def test_a_file_must_not_pass_for_a_shipped_target(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(profile_text("int4-vllm"), "utf-8")
    assert load_profile(str(path)) == load_profile("int4-vllm")
    path.write_text(profile_text("int4-vllm").replace("group_size = 32", "group_size = 64"), "utf-8")
    with pytest.raises(ProfileError, match="'int4-vllm' is taken"):
        load_profile(str(path))


def with_gates(*lines: str) -> str:
    return "\n".join(['extends = "int4-vllm"', 'name = "mine"', 'description = "mine"', "[gates]", *lines])


@pytest.mark.parametrize("bound", GateSpec.model_fields)
def test_a_gate_that_could_not_fail_is_refused(bound: str) -> None:
    """Comparisons with NaN are false, so that every measurement would pass."""
    with pytest.raises(ProfileError, match=f"gates.{bound}: .*nan is no bound"):
        parse_profile(with_gates(f"{bound} = nan"), "mine.toml")


def test_bounds_in_the_wrong_order_are_all_named() -> None:
    with pytest.raises(ProfileError) as caught:
        parse_profile(with_gates("gap_mean_fail = 0.5", "greedy_agreement_fail = 0.99", "kl_k3_warn = 0.3"), "mine.toml")
    (line,) = caught.value.offenders
    for part in (
        "gap_mean_fail = 0.5 must be at least gap_mean_warn = 1",
        "greedy_agreement_fail = 0.99 must be at most",
        "kl_k3_fail = 0.2",
    ):
        assert part in line


def test_bounds_may_be_equal_and_infinite() -> None:
    gates = parse_profile(with_gates("gap_mean_fail = inf", "kl_k3_warn = 0.2", "greedy_agreement_fail = -inf"), "mine.toml").gates
    assert (gates.gap_mean_fail, gates.kl_k3_warn, gates.kl_k3_fail) == (float("inf"), 0.2, 0.2)


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_profile_has_the_name_of_its_file(name: str) -> None:
    assert shipped_profiles()[name].name == name
