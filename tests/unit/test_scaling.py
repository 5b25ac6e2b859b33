"""The simulation of a step against closed forms, against the pool that it imitates, and against what was measured."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.common import RESULTS
from benchmarks.scaling import overlap
from benchmarks.scaling.__main__ import DOCS
from benchmarks.scaling.events import Process, Shared, Simulation, Sleep, Use
from benchmarks.scaling.model import Cluster, Costs, Decode, Workload, requests_of, simulate, slots
from benchmarks.scaling.plan import HARDWARE, Hardware, Measured, Scenario, entry, read_hardware
from benchmarks.scaling.report import PLAN_FILE, fill, page_of, read_plan
from deploy_targets.engines.pool import Place, PoolEngine, PoolRules
from deploy_targets.types import Generation, Sampling

DECODE = Decode((1, 101), (0.01, 0.02), request_s=0.5, response_s=0.002, max_batch=1000)
FREE = Costs(
    decode=Decode((1, 2), (0.0, 0.0), 0.0, 0.0, 1000), reward_s=0, learner_fixed_s=0, forward_s=0, train_s=0, old_logp_s=0, reduce_s=0,
    quantize_s=0, pack_s=0, update_bytes=0, load_s=0, twin_s=0, score_s=0,
)  # fmt: skip
EQUAL = Workload(64, 4, 10.0, (50,), taught_share=0.25)
MEASURED = Measured(relative_lengths=(0.5, 1.0, 1.5), delta_share=0.05, quantize_parameters_s=1e8, pack_bytes_s=5e8, unpack_bytes_s=5e8)


def run(*processes: Process) -> float:
    def main() -> Process:
        yield list(processes)

    return Simulation().run(main())


def use(resource: Shared, amount: float, after: float = 0.0) -> Process:
    yield Sleep(after)
    yield Use(resource, amount)


@pytest.mark.parametrize(("jobs", "seconds"), [(1, 3.0), (2, 3.0), (3, 4.5), (4, 6.0)])
def test_cores_are_shared_and_a_job_takes_one_at_most(jobs: int, seconds: float) -> None:
    cores = Shared(2, each=1.0)
    assert run(*(use(cores, 3.0) for _ in range(jobs))) == pytest.approx(seconds)


def test_a_job_that_comes_later_slows_the_first_down_from_then_on() -> None:
    """One core: 2 s alone, then both at half speed until the first has its 4."""
    core, ends = Shared(1, each=1.0), {}
    simulation = Simulation()

    def noted(name: str, process: Process) -> Process:
        yield from process
        ends[name] = simulation.now

    def main() -> Process:
        yield [noted("first", use(core, 4.0)), noted("second", use(core, 3.0, after=2.0))]

    simulation.run(main())
    assert ends == {"first": pytest.approx(6.0), "second": pytest.approx(7.0)}


def test_cores_may_be_slower_when_more_than_one_computes() -> None:
    cores = Shared(2, each=1.0, crowd=0.8)
    assert run(use(cores, 4.0), use(cores, 8.0)) == pytest.approx(4 / 0.8 + 4)


def test_waiting_for_nothing_takes_no_time() -> None:
    assert run() == 0.0


def test_one_engine_is_the_sum_of_its_parts() -> None:
    """4 requests of 64 responses of 50 tokens, then everything else one after the other."""
    costs = Costs(
        decode=DECODE, reward_s=0.001, learner_fixed_s=0.3, forward_s=1e-4, train_s=3e-4, old_logp_s=1e-4, reduce_s=9.0, quantize_s=0.7,
        pack_s=0.2, update_bytes=100.0, load_s=0.4, twin_s=0.6, score_s=0.1,
    )  # fmt: skip
    found = simulate(costs, Cluster(1, nic=50.0, latency_s=0.01), EQUAL)
    request = 0.5 + 64 * 0.002 + 50 * (0.01 + 0.01 * 63 / 100)
    tokens = 64 * 10 + 256 * 49
    assert found.rollout == pytest.approx(4 * (request + 0.01))
    assert found.decode == pytest.approx(4 * request)
    assert found.reward == pytest.approx(0.256)
    assert found.learn == pytest.approx(0.3 + tokens * (0.25 * 3e-4 + 0.75 * 1e-4))
    assert found.publish == pytest.approx(0.7 + (0.2 + 2.0 + 0.01 + 0.4) + (0.6 + 0.01 + 0.1))
    assert found.step == pytest.approx(found.rollout + found.reward + found.learn + found.publish)


@pytest.mark.parametrize("num_engines", [2, 4, 16])
def test_equal_engines_share_equal_responses(num_engines: int) -> None:
    """Decode alone, at a cost per response that no batch size changes: n engines take 1/n."""
    linear = replace(FREE, decode=Decode((1, 101), (0.01, 1.01), 0.0, 0.0, 1000))
    one, many = (simulate(linear, Cluster(n), EQUAL) for n in (1, num_engines))
    assert many.rollout == pytest.approx(one.rollout / num_engines)
    assert many.stragglers == pytest.approx(0.0)


def test_the_difference_is_made_once_and_sent_to_each() -> None:
    costs = replace(FREE, pack_s=3.0, update_bytes=100.0)
    assert simulate(costs, Cluster(16, nic=50.0), EQUAL).update == pytest.approx(3 + 16 * 2)


def test_more_engines_than_prompts_stand_idle() -> None:
    linear = replace(FREE, decode=DECODE)
    assert simulate(linear, Cluster(64), EQUAL).rollout == pytest.approx(simulate(linear, Cluster(256), EQUAL).rollout)


def test_a_request_takes_as_long_as_its_longest_response() -> None:
    """Exponential lengths: the longest of n has n times H(n) / n, the harmonic number, of the mean."""
    size, mean = 64, 1000.0
    lengths = np.maximum(1, np.random.default_rng(0).exponential(mean, (4000, size)).round()).astype(int)
    flat = Decode((1, 1000), (1.0, 1.0), 0.0, 0.0, 1000)
    harmonic = sum(1 / k for k in range(1, size + 1))
    assert np.mean([flat.seconds(row) for row in lengths]) == pytest.approx(mean * harmonic, rel=0.02)


def test_every_token_is_decoded_once() -> None:
    """At a cost per token and nothing else, no cut into batches and requests changes the sum."""
    lengths = np.random.default_rng(1).integers(1, 300, 200)
    for max_batch in (1, 7, 64, 1000):
        per_token = Decode((1, 2), (1.0, 2.0), 0.0, 0.0, max_batch)
        assert per_token.seconds(lengths) == pytest.approx(lengths.sum())
        starts, ends = slots(lengths, max_batch)
        assert max(int(((starts <= t) & (ends > t)).sum()) for t in starts) <= max_batch
    workload = Workload(40, 5, 10.0, (1, 17, 300), 1.0)
    costs = replace(FREE, decode=Decode((1, 2), (1.0, 2.0), 0.0, 0.0, 1000))
    for num_engines in (1, 3, 8):
        found = simulate(costs, Cluster(num_engines), workload)
        assert found.decode * num_engines == pytest.approx(found.num_tokens)


@pytest.mark.parametrize(("link", "seconds"), [(math.inf, 8 * 1e9 / 2e9), (1e8, 10.0)])
def test_a_publish_takes_bytes_over_bandwidth(link: float, seconds: float) -> None:
    """Eight engines: bound by the learner's network, or by their own."""
    assert simulate(replace(FREE, update_bytes=1e9), Cluster(8, nic=2e9, link=link), EQUAL).step == pytest.approx(seconds)


def test_ranks_share_what_can_be_shared() -> None:
    costs = replace(FREE, train_s=1e-3, learner_fixed_s=1.0, reduce_s=0.25)
    one, four = (simulate(costs, Cluster(1, ranks), EQUAL).learn for ranks in (1, 4))
    assert four == pytest.approx((one - 1.0) / 4 + 1.0 + 0.25)
    on_two_cores = simulate(costs, Cluster(1, 4, local_cores=2), EQUAL).learn
    assert on_two_cores == pytest.approx((one - 1.0) / 2 + 2.0 + 0.25)


def test_one_step_off_takes_the_longer_of_both() -> None:
    costs = replace(FREE, decode=DECODE, train_s=1e-3, old_logp_s=1e-4, quantize_s=2.0)
    sync, beside = (simulate(costs, Cluster(2, schedule=schedule), EQUAL) for schedule in ("sync", "one_step_off"))
    assert sync.step == pytest.approx(sync.rollout + sync.learn + 2.0)
    assert beside.step == pytest.approx(max(beside.rollout, beside.learn) + 2.0)
    assert beside.learn > sync.learn


@pytest.mark.parametrize(("num_prompts", "group_size", "num_engines"), [(16, 8, 1), (16, 8, 4), (12, 2, 3), (5, 3, 4), (7, 1, 2)])
def test_requests_are_cut_as_the_pool_cuts_them(num_prompts: int, group_size: int, num_engines: int, tmp_path: Path) -> None:
    asked: list[int] = []

    class Engine:
        weight_version = 0

        def generate(self, prompts: list[tuple[int, ...]], sampling: Sampling) -> list[Generation]:
            asked.append(len(prompts))
            return [Generation(prompt, np.ones(1, np.int32), np.zeros(1, np.float32), 0, 1.0, "length") for prompt in prompts]

        def close(self) -> None:
            pass

    places = [Place(str(i), lambda folder, version: Engine()) for i in range(num_engines)]  # type: ignore[arg-type,return-value]
    pool = PoolEngine(places, tmp_path, 0, rules=PoolRules(), say=print)
    pool.generate([(1, prompt) for prompt in range(num_prompts) for _ in range(group_size)], Sampling(4))
    pool.close()
    assert sorted(asked) == sorted(
        len(part) for part in requests_of(num_prompts, group_size, PoolRules().requests_per_engine * num_engines)
    )


def test_the_plan_names_what_is_slow() -> None:
    """Hardware in which one thing is slow beyond doubt."""
    hardware = read_hardware()
    base = Scenario(hardware, MEASURED, "7B", "gpu", 8)

    def bottleneck(scenario: Scenario) -> str:
        return str(entry(scenario)["bottleneck"])

    def with_learner(**change: float) -> Scenario:
        return replace(base, hardware=hardware.model_copy(update={"learner": hardware.learner.model_copy(update=change)}))

    assert bottleneck(with_learner(flop_s=1e12)) == "learner"
    assert bottleneck(with_learner(nic_bytes_s=1e5)) == "publish network"
    assert bottleneck(replace(base, measured=MEASURED.model_copy(update={"pack_bytes_s": 1e4}))) == "differences"
    assert bottleneck(replace(base, measured=MEASURED.model_copy(update={"quantize_parameters_s": 1e3}))) in ("quantize", "proof")
    slow = hardware.engines["gpu"].model_copy(update={"memory_bytes_s": 1e9})
    assert bottleneck(replace(base, hardware=hardware.model_copy(update={"engines": {"gpu": slow}}))) == "decode"


def test_a_model_without_room_is_left_out() -> None:
    hardware = read_hardware()
    small = hardware.engines["gpu"].model_copy(update={"memory_bytes": 2.4e10})
    assert Scenario(hardware.model_copy(update={"engines": {"gpu": small}}), MEASURED, "70B", "gpu", 8).max_batch == 0


def test_hardware_with_a_wrong_key_is_refused() -> None:
    found = tomllib.loads(HARDWARE.read_text("utf-8"))
    found["learner"]["nic"] = 1.0
    with pytest.raises(ValidationError, match=r"learner\.nic"):
        Hardware.model_validate(found)


def test_the_shipped_record_is_within_a_fifth_of_what_was_measured() -> None:
    for path in RESULTS.glob("scaling.json"):
        ratios = {name: case["ratio_median"] for name, case in json.loads(path.read_text("utf-8"))["cases"].items()}
        assert {(1, 1), (2, 1), (4, 1), (1, 2)} <= {tuple(int(part.split()[0]) for part in name.split(", ")[:2]) for name in ratios}
        assert all(abs(ratio - 1) <= 0.2 for ratio in ratios.values()), ratios


def test_the_shipped_plan_is_what_the_simulation_says() -> None:
    """One line of it; all take a while."""
    about, (shipped, *_) = read_plan(RESULTS / PLAN_FILE)
    assert about["hardware"] == read_hardware().model_dump(), "make it anew: python -m benchmarks.scaling plan --measure"
    measured = Measured.model_validate(about["measured"])
    found = entry(Scenario(read_hardware(), measured, shipped["model"], shipped["engine"], shipped["num_engines"]))
    assert found["bottleneck"] == shipped["bottleneck"]
    for name in ("spent_s", "saved"):
        assert found[name] == pytest.approx(shipped[name], rel=1e-6, abs=1e-9)


def test_the_pages_and_charts_are_made_from_the_records(tmp_path: Path) -> None:
    plan, scale = ((DOCS / name).read_text("utf-8") for name in ("scaling.md", "scale.md"))
    assert page_of(RESULTS, plan, tmp_path / "scaling") == plan
    assert fill(scale, "overlap", overlap.text()) == scale
    for chart in (tmp_path / "scaling").iterdir():
        assert (DOCS / "images" / "scaling" / chart.name).read_text("utf-8") == chart.read_text("utf-8")


def test_accuracies_of_two_schedules_are_paired_by_seed() -> None:
    runs = [
        {**overlap.CELL, "regime": regime, "seed": seed, "deployed_accuracy": accuracy}
        for regime, found in {"on_policy": {0: 0.5, 1: 0.7, 2: 0.9}, "one_step_off": {1: 0.8, 0: 0.58, 7: 0.1}}.items()
        for seed, accuracy in found.items()
    ]
    seeds, difference = overlap.paired([*runs, {**runs[0], "arm": "grpo", "deployed_accuracy": 0.0}])
    assert seeds == [0, 1]
    assert difference.mean == pytest.approx(0.09)
    assert difference.half == pytest.approx(12.706 * 0.01)
