"""The evidence suite: what its cells set, that a run resumes, and that the tables say what the lines say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence.__main__ import main
from benchmarks.evidence.cells import ARMS, SUITES, TASKS, Cell, cells, default_arm
from benchmarks.evidence.estimates import Estimate, Run, gap_at_equal_reward, late_reward, read_runs
from benchmarks.evidence.report import accuracy_table, difference_table, sweep, write_report
from benchmarks.evidence.runner import finished
from benchmarks.evidence.shipped import default_table, forms_table, remeasured_table
from benchmarks.evidence.tasks import last_step, samples
from benchmarks.evidence.warm_start import fresh_samples
from hetero_rl.config import load_config
from hetero_rl.unused_settings import unused_settings
from tests.unit.test_benchmarks import ROOT


@pytest.mark.parametrize("name", SUITES)
def test_every_cell_is_a_valid_run(name: str) -> None:
    for cell in cells(SUITES[name]):
        task = () if TASKS[cell.task].size is None else ("task.type=dataset", "task.path=a.jsonl", "task.heldout_path=b.jsonl")
        config, _ = load_config([], [*task, *cell.settings], cell.rollout_target)
        assert not list(unused_settings(config)), cell.key


def test_a_suite_can_be_narrowed_and_has_no_cell_twice() -> None:
    everything = list(cells(SUITES["finalists"]))
    assert len(set(everything)) == len(everything)
    some = list(cells(SUITES["finalists"], task=["addition"], seed=[3]))
    assert {(cell.task, cell.seed) for cell in some} == {("addition", 3)}
    assert [cell for cell in everything if cell.task == "addition" and cell.seed == 3] == some
    assert len(list(cells([*SUITES["tolerance"], *SUITES["tolerance"]]))) == len(list(cells(SUITES["tolerance"])))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "addition"], "give --targets, --regimes, --arms, --seeds"),
        (["--suite", "tolerance", "--arms", "ptq"], "suite 'tolerance' has no such cell"),
        (["--suite", "screening", "--arms", "greybox"], "invalid choice: 'greybox' (choose from 'control', 'ptq'"),
    ],
)
def test_a_choice_without_cells_is_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *options])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_expressions_and_sorted_lists_are_solved_by_what_they_say() -> None:
    for sample, _ in zip(samples("expression"), range(50), strict=False):
        assert eval(sample.prompt.removesuffix("=")) == int(sample.answer)
        assert all(eval(step) == int(sample.answer) for step in sample.solution.split(";"))
        assert last_step([sample.prompt], [sample.solution], [sample.answer]) == [1.0]
        assert last_step([sample.prompt], [sample.solution + "1"], [sample.answer]) == [0.0]
    for sample, _ in zip(samples("sorting"), range(50), strict=False):
        assert sorted(sample.prompt.removesuffix(":").split()) == sample.answer.split()


def run(arm: str, seed: int, accuracy: float, gap: float = 0.02, **changes: Any) -> dict[str, Any]:
    base = {
        "cell": f"addition/int4-onnx/on_policy/{arm}/{seed}",
        **{"task": "addition", "target": "int4-onnx", "regime": "on_policy", "arm": arm, "seed": seed, "collapsed": False},
        **{"deployed_accuracy": accuracy, "learner_accuracy": accuracy - 0.01, "floor": 0.01},
        **{"reward": [0.1 * i for i in range(10)], "engine_gap": [gap] * 10, "curve": [[0, 0.4, 0.4], [10, accuracy, accuracy]]},
    }
    return {**base, **changes}


def test_intervals_are_students() -> None:
    """Against the closed form for two and three values."""
    assert Estimate.of([1.0, 3.0]).half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-3)
    assert Estimate.of([1.0, 2.0, 3.0]).half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert Estimate.of([0.5]).text(100) == "50.0"


def test_tables() -> None:
    runs = [run("grpo", 0, 0.50), run("grpo", 1, 0.60), run("tis", 0, 0.40), run("tis", 1, 0.42, collapsed=True), run("control", 0, 0.9)]
    runs += [run("grey_dual", 0, 0.58, gap=0.005), run("grey_dual", 1, 0.70, gap=0.005)]
    rows = {line.split("`")[1]: line for line in accuracy_table(runs)[2:]}
    assert "**64.0 ± " in rows["grey_dual"]
    assert "†1" in rows["tis"]
    assert "**" not in rows["control"], "no mismatch is no rival"
    [row] = difference_table(runs)[2:]
    assert "| `grpo` 55.0 ± " in row
    assert "| +9.0 ± 12.7 | +0.0 ± 0.0 | 0.50 ± 0.00 against 2.00 ± 0.00 |" in row
    assert math.isnan(late_reward(run("ptq", 0, 0.5))), "another engine made its rollouts"
    assert late_reward(run("tis", 0, 0.5, reward=[0.0] * 60 + [0.5] * 10 + [0.7] * 10)) == pytest.approx(0.6)


def test_the_sweep_orders_the_bounds_and_names_the_time(tmp_path: Path) -> None:
    slow = run("grey_0.5x", 0, 0.5, gap=0.005, curve=[[0, 0.4, 0.4], [40, 0.42, 0.4], [80, 0.5, 0.5]])
    runs = [run("grpo", 0, 0.50), run("grey_2x", 0, 0.52), run("grey_dual", 0, 0.55), slow]
    rows = [line for line in sweep([{"gap": r["engine_gap"][-1], **r} for r in runs], tmp_path) if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| bound / floor", "| ---", "| 0.5", "| 1", "| 2", "| none"]
    assert rows[2].split(" | ")[1:] == ["50.0", "45.0", "49.0", "0.50", "80 |"]
    assert (tmp_path / "tolerance-addition-int4-onnx.svg").is_file()
    assert not sweep([run("grpo", 0, 0.5)], tmp_path)


def test_rivals_of_other_units_and_of_other_engines() -> None:
    """The most seeds count before the best mean; another floor is another unit; a rival judged by another engine has no sampled reward."""
    runs = [run("grpo", seed, 0.5, floor=0.05, gap=0.05) for seed in (0, 1)] + [run("tis", 7, 0.9)]
    runs += [run("grey", seed, 0.6, floor=0.05, gap=0.025) for seed in (0, 1)]
    runs += [run("fake_quant", seed, 0.55, floor=0.0026, gap=0.0031) for seed in (0, 1)]
    runs += [run("fake_quant_grey", seed, 0.57, floor=0.0026, gap=0.003) for seed in (0, 1)]
    rows = {row.split(" | ")[2]: row for row in difference_table(runs)[2:]}
    assert "`fake_quant` 55.0" in rows["`grey`"]
    assert "| 0.50 ± 0.00 against 1.00 ± 0.00 |" in rows["`grey`"]
    assert rows["`fake_quant_grey`"].endswith("|  |"), "its learner measures another gap"
    [row] = difference_table([run("ptq", 0, 0.9), run("ptq", 1, 0.9), run("grey", 0, 0.6), run("grey", 1, 0.6)])[2:]
    assert "| -30.0 ± 0.0 |  |" in row


@pytest.mark.parametrize(
    ("target", "arm"),
    [("q2_k-llamacpp", "fake_quant_recipe"), ("int4-onnx", "guard"), ("fp8-vllm-fp8kv", "recipe"), ("bf16-vllm", "grpo")],
)
def test_the_default_of_a_target_is_an_arm(target: str, arm: str) -> None:
    assert default_arm(target) == arm


def promise(default: list[float], rival: list[float], ptq: list[float], control: list[float], **changes: Any) -> list[str]:
    """The row of INT4, whose default is `guard`, without its first three columns."""
    arms = {"guard": default, "grpo": rival, "ptq": ptq, "control": control}
    runs = [run(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)]
    runs = [{**one, **changes} if one["arm"] == "guard" and one["seed"] == 0 else one for one in runs]
    [row] = default_table(runs)[2:]
    return row.strip("| ").split(" | ")[3:]


def test_the_promise_of_the_default_is_checked() -> None:
    rival, ptq, control = [0.61] * 5, [0.50, 0.51, 0.50, 0.51, 0.50], [0.62, 0.62, 0.63, 0.62, 0.63]
    seeds, best, to_best, to_ptq, cost, collapsed, kept = promise([0.60, 0.62, 0.61, 0.60, 0.62], rival, ptq, control)
    assert (seeds, best[:11], to_best) == ("5", "`grpo` 61.0", "+0.0 ± 1.2")
    assert (to_ptq, cost) == ("+10.6 ± 1.4", "+12.0 ± 1.2")
    assert (collapsed, kept) == ("0 of 5", "yes")
    assert promise([0.60, 0.62], rival[:2], ptq[:2], control[:2])[-1] == "nothing against it in 2 seeds"
    assert promise([0.58, 0.57, 0.58, 0.57, 0.58], rival, ptq, control)[-1] == "behind the best rival"
    low = [0.50, 0.51, 0.52, 0.49, 0.51]
    assert promise(low, [0.50] * 5, ptq, control)[-1] == "not shown to be above `ptq`"
    assert promise(low, [0.50] * 5, ptq, [0.52, 0.51, 0.49, 0.50, 0.51])[-1] == "yes", "quantizing costs nothing that can be seen"
    crashed = promise([0.60, 0.62, 0.61, 0.60, 0.62], rival, ptq, control, collapsed=True)
    assert crashed[-2:] == ["1 of 5", "collapsed where a rival did not"]
    [not_run] = default_table([run("grpo", 0, 0.5)])[2:]
    assert not_run.endswith("not run |")


def test_a_collapse_that_every_rival_shares_is_not_the_defaults_fault() -> None:
    runs: list[Run] = [run(arm, seed, 0.1, collapsed=True) for arm in ("guard", "grpo") for seed in range(5)]
    [row] = default_table(runs)[2:]
    assert row.endswith("| 5 of 5 | yes |")


def test_a_cheaper_form_keeps_a_share_of_the_fall() -> None:
    gaps = {"grpo": 0.04, "grey": 0.02, "grey_share": 0.025}
    runs = [run(arm, seed, 0.5, gap=gap) for arm, gap in gaps.items() for seed in (0, 1)] + [run("grey_top", 7, 0.5)]
    whole, share = forms_table(runs)[2:]
    assert whole.split(" | ")[1:7] == ["`grey`", "2", "2.00", "2.00", "4.00", "100 %"]
    assert share.split(" | ")[1:7] == ["`grey_share`", "2", "2.50", "2.00", "4.00", "75 %"]
    assert share.split(" | ")[7].endswith(" x")


def test_a_floor_measured_anew_is_the_gap_of_the_run() -> None:
    gaps = [0.01] * 30 + [0.02] * 10 + [0.03] * 80
    runs = [run(arm, seed, 0.5, engine_gap=gaps, reward=[0.5] * 120) for arm in ("grpo", "recipe") for seed in (0, 1, 2)]
    rows = remeasured_table(runs)[2:]
    assert rows == [f"| addition, int4-onnx, on_policy | `{arm}` | 2.00 ± 0.00 | 3.00 ± 0.00 | 3.00 ± 0.00 |" for arm in ("grpo", "recipe")]
    assert remeasured_table(runs[:1])[2:] == []


def test_a_cell_that_has_changed_is_run_again(tmp_path: Path) -> None:
    cell = Cell("addition", "int4-onnx", "on_policy", "grpo", 0)
    path = tmp_path / "lines.jsonl"
    lines = [{"cell": cell.key, "settings": ["loop.num_steps=2"]}, {"cell": cell.key, "settings": [*cell.settings]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert finished(path) == {cell.key: ([*cell.settings], "")}
    assert [line["settings"] for line in read_runs(path)] == [[*cell.settings]]


def test_warm_starts_see_no_problem_of_a_run() -> None:
    """An arithmetic task has few problems: what is drawn under another seed comes up again."""
    of_runs = {sample.prompt for sample in islice(samples("expression"), 41_000)}
    assert {sample.prompt for sample in islice(samples("expression", 1), 41_000)} & of_runs
    model_sees = {sample.prompt for sample in islice(fresh_samples("expression", 1), 2_000)}
    assert not model_sees & of_runs


def test_a_collapsed_policy_is_compared_at_the_reward_it_had() -> None:
    """Its gap is small at the end; at the reward that both reached, it was not."""
    rising = [i / 40 for i in range(40)]
    good = run("grpo", 0, 0.9, reward=rising, engine_gap=[0.02] * 40)
    collapsed = run("tis", 0, 0.0, reward=rising[:20] + [0.0] * 20, engine_gap=[0.03] * 20 + [0.001] * 20)
    assert gap_at_equal_reward([good, collapsed]) == pytest.approx([2.0, 3.0], rel=0.3)


def test_report_is_made_from_the_lines_alone(tmp_path: Path) -> None:
    page, lines = tmp_path / "evidence.md", tmp_path / "evidence.jsonl"
    page.write_text("# Before\n<!-- evidence: made by python -m benchmarks.evidence report -->\nold\n<!-- end of evidence -->\nafter\n")
    lines.write_text("".join(json.dumps(run(arm, 0, 0.5)) + "\n" for arm in ("grpo", "grey_dual")))
    write_report(lines, page)
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (tmp_path / "images/evidence/on_policy-addition-int4-onnx.svg").read_text().startswith("<svg")
    write_report(lines, page)
    assert page.read_text() == text


@pytest.mark.slow
@pytest.mark.variant
def test_a_suite_resumes(tmp_path: Path) -> None:
    """One run through the command line; asked again, there is nothing to do."""
    out = tmp_path / "lines.jsonl"
    choice = ["--tasks", "addition", "--targets", "int4-onnx", "--regimes", "on_policy", "--arms", "ptq", "--seeds", "0"]
    settings = ["loop.num_steps=2", "loop.prompts_per_step=4", "evaluation.num_problems=20", "evaluation.num_final_problems=20"]
    settings += ["checkpoint.every_steps=2", "learner.warmup_steps=1", "learner.compute_dtype=float32"]
    command = [sys.executable, "-m", "benchmarks.evidence", "run", *choice, "--out", str(out)]
    command += ["--work", str(tmp_path / "work"), *(part for setting in settings for part in ("--set", setting))]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
    assert "0 runs to do, 1 done" in done.stderr
    [line] = [json.loads(text) for text in out.read_text().splitlines()]
    assert line["cell"] == Cell("addition", "int4-onnx", "on_policy", "ptq", 0).key
    assert line["gap"] > 0.001, "judged by the target, not by the engine that made the rollouts"
    assert line["floor"] < 1e-4
    assert len(line["reward"]) == 2
    assert set(ARMS) >= {line["arm"]}
