"""A setting that another one switches off is named; defaults and settings in force are not."""

from __future__ import annotations

import pytest

from deploy_targets.errors import ProfileError
from hetero_rl.config import RunConfig, load_config
from hetero_rl.unused_settings import unused_settings
from tests.unit.test_benchmarks import ROOT


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([], []),
        (["algorithm.correction_high=3.0"], ["algorithm.correction_high"]),
        (["algorithm.correction_high=3.0", "algorithm.correction='tis'"], []),
        (["algorithm.correction_low=0.1", "algorithm.correction='tis'"], ["algorithm.correction_low"]),
        (["constraint.kp=2.0"], ["constraint.kp"]),
        (["constraint.kp=2.0", "constraint.controller='pid'"], []),
        (["constraint.grey_box_form='top'", "constraint.signal='loss'"], ["constraint.grey_box_form"]),
        (["constraint.signal='off'", "constraint.eta=0.2", "constraint.lambda_init=0.5"], ["constraint.lambda_init", "constraint.eta"]),
        (["constraint.controller='fixed'", "constraint.patience=5", "constraint.lambda_init=0.5"], ["constraint.patience"]),
        (["constraint.advantage_form='response'"], ["constraint.advantage_form"]),
        (["constraint.advantage_form='response'", "constraint.signal='advantage'"], []),
        (["constraint.tolerance_min=0.1", "constraint.tolerance_unit='absolute'"], ["constraint.tolerance_min"]),
        (["constraint.floor_every=10"], []),
        (["constraint.floor_every=10", "constraint.tolerance_unit='absolute'"], ["constraint.floor_every"]),
        (["loop.num_steps=10", "learner.warmup_steps=11"], ["learner.lr"]),
        (["loop.num_steps=10", "learner.warmup_steps=10"], []),
        (["pool.min_engines=1"], ["pool.min_engines"]),
        (["pool.min_engines=1", "engines=[{count = 2}]"], []),
        (["ray.gpus_per_rank=1"], ["ray.gpus_per_rank"]),
        (["ray.gpus_per_rank=1", "learner.launcher='ray'"], []),
        (["ray.gpus_per_engine=1", "engines=[{placement = 'ray'}]"], []),
    ],
)
def test_what_is_named(settings: list[str], named: list[str]) -> None:
    config, _ = load_config([], settings)
    assert [sentence.split()[0] for sentence in unused_settings(config)] == named


def test_the_shipped_config_uses_all_it_says() -> None:
    config, _ = load_config(sorted((ROOT / "configs").glob("*.toml")))
    assert not list(unused_settings(config))


def test_lambda_above_its_bound_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"constraint\.lambda_init = 2 is above constraint\.lambda_max = 1"):
        load_config([], ["constraint.lambda_init=2.0", "constraint.lambda_max=1.0"])
    with pytest.raises(ProfileError, match=r"lambda_init = 1 is above constraint\.lambda_max = 0\.3, the bound of signal 'loss'"):
        load_config([], ["constraint.signal=loss", "constraint.lambda_init=1.0"])
    with pytest.raises(ProfileError, match=r"lambda_min = 0\.3 is above constraint\.lambda_max = 0\.2"):
        load_config([], ["constraint.lambda_init=0.1", "constraint.lambda_max=0.2"], "q2_k-llamacpp")
    assert RunConfig.model_validate({"constraint": {"signal": "loss"}}).constraint.multiplier_cap == 0.3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["algorithm.loss='dppo'", "algorithm.correction='tis'"], "would do so twice"),
        (["algorithm.score_centering=true", "algorithm.loss='gspo'"], "derived for algorithm.loss = 'ppo_clip', not for 'gspo'"),
        (["algorithm.score_centering=true", "algorithm.correction='mis_sequence'"], "whose weight belongs to a whole response"),
        (["algorithm.score_centering=true", "learner.forward='fake_quant'"], "nothing to centre"),
        (["constraint.signal=flatness", "learner.forward=fake_quant"], "learner.forward = 'fake_quant' needs the target's own"),
        (["loop.publish_gate=1.1", "loop.publish_every=2", "checkpoint.every_steps=2"], "judges and undoes single steps"),
        (["constraint.floor_every=3", "loop.publish_every=2", "checkpoint.every_steps=2"], "a floor is the gap of the same weights"),
        (["constraint.measure='k1'"], "multiples of its floor bound nothing"),
        (["engines=[{count = 2}]", "pool.min_engines=3"], "pool.min_engines = 3 is more than the 2"),
        (["engines=[{url = 'http://x', count = 2, token_file = 't'}]"], "one url is one agent"),
        (["engines=[{token_file = 't'}]"], "token_file belong to an agent or a server: give its url"),
        (["engines=[{server = 'vllm'}]"], "server belong to an agent or a server: give its url"),
        (["engines=[{url = 'http://x', token_file = 't', folder = 'f'}]"], 'folder and folder_there are for server = "vllm"'),
        (["engines=[{url = 'http://x', server = 'vllm', folder_there = '/f'}]"], "give folder, its path on this machine"),
        (["engines=[{url = 'http://x'}]"], "an agent wants its token"),
        (["algorithm.correction='mis'", "algorithm.correction_low=3.0"], "is above algorithm.correction_high = 2"),
    ],
)
def test_contradictions_are_refused_with_the_reason(settings: list[str], reason: str) -> None:
    with pytest.raises(ProfileError, match=reason):
        load_config([], settings)


def test_ranges_are_those_of_the_loss() -> None:
    assert load_config([], [])[0].algorithm.clip == (0.2, 0.28)
    assert load_config([], ["algorithm.loss='gspo'"])[0].algorithm.clip == (3e-4, 4e-4)
    assert load_config([], ["algorithm.loss='gspo'", "algorithm.clip_high=0.01"])[0].algorithm.clip == (3e-4, 0.01)
