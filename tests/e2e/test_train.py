"""The whole way through the real command line: train against the real INT4 engine, export, verify, resume, tamper."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
from tokenizers import Tokenizer

from deploy_targets.manifest import read_manifest
from deploy_targets.weights_file import sha256_of
from hetero_rl.checkpoint import load_state
from hetero_rl.metrics import METRICS, read_metrics
from tests.command_line import SHORT_RUN, at_step, environment_of, fails, hetero_rl, with_settings
from tests.plugins import python_path

TRAIN = ("train", "--target", "int4-onnx", *with_settings(*SHORT_RUN, "constraint.floor_every=2"))
STABLE_METRICS = (
    "step", "reward/mean", "constraint/engine_gap", "constraint/floor", "constraint/tolerance", "constraint/lambda",
    "constraint/staleness_gap", "engine/nonfinite_logprobs", "weights/version", "perf/step_s", "perf/rollout_s", "perf/learner_s",
    "perf/publish_s", "perf/rollout_tokens_per_s",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the demo model against ONNX Runtime, trained once for all tests; they must not change it."""
    folder = tmp_path_factory.mktemp("train")
    result = hetero_rl(*TRAIN, "--run-dir", "run", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "deployed accuracy" in result.stdout
    assert "recipe guard, chosen for int4-onnx because 4-bit weights cost little" in result.stdout, "nobody named a recipe or a signal"
    return folder / "run"


@pytest.fixture
def artifact(run: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be tampered with."""
    return Path(shutil.copytree(run / "artifact", tmp_path / "artifact"))


def exact(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if METRICS[name].exact}


def test_metrics(run: Path) -> None:
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(name in row for row in rows[1:] for name in STABLE_METRICS)
    assert all("eval/deployed_accuracy" in rows[step] and "eval/learner_accuracy" in rows[step] for step in (0, 2, 4))
    assert [row["weights/version"] for row in rows[1:]] == [0, 1, 2, 3]
    assert all(row["constraint/engine_gap"] > 0 and row["constraint/staleness_gap"] == 0 for row in rows[1:])
    assert 0.3 < rows[0]["eval/deployed_accuracy"] < 0.7


def test_the_floor_is_measured_anew_on_schedule(run: Path) -> None:
    rows = read_metrics(run)
    floors = [row["constraint/floor"] for row in rows]
    assert floors[0] == floors[1] != floors[2] == floors[3]
    assert floors[4] == floors[3], "after the last step there is nothing more to bound"
    assert floors[2] == pytest.approx(floors[0], rel=0.3), "the same problems and seeds, and weights of two steps later"
    assert [row["constraint/tolerance"] for row in rows] == pytest.approx([1.5 * floor for floor in floors])
    manifest = read_manifest(run / "artifact")
    assert (manifest.floor, manifest.tolerance) == (pytest.approx(floors[4]), pytest.approx(1.5 * floors[4]))
    assert ["perf/floor_s" in row for row in rows] == [False, False, True, False, False]


def test_run_folder(run: Path) -> None:
    for name in ("config.json", "environment.json", "metrics.jsonl", "report.html", "artifact/manifest.json"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    report = (run / "report.html").read_text()
    assert report.count("<svg") == 6
    assert "http" not in report.replace("http://www.w3.org", "").replace("https://www.w3.org", "").replace("http://purl.org", "")


def test_exported_weights_are_those_that_were_served(run: Path) -> None:
    """Law 1: the artifact's weights are the file the engine served from."""
    served = sha256_of(run / "serving" / "model.safetensors")
    assert sha256_of(run / "artifact" / "model.safetensors") == served


def test_export_again_gives_the_same_weights(run: Path, tmp_path: Path) -> None:
    result = hetero_rl("export", run, "--out", "again", "--bundle", "again.tar.zst", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sha256_of(tmp_path / "again" / "model.safetensors") == sha256_of(run / "artifact" / "model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"again", "again.tar.zst"}
    verified = hetero_rl("verify-deploy", "again.tar.zst", "--json", "v.json", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout
    assert json.loads((tmp_path / "v.json").read_text())["artifact_sha256"] == sha256_of(tmp_path / "again" / "manifest.json")


def test_verify_deploy(run: Path, tmp_path: Path) -> None:
    outputs = ("--json", "v.json", "--html", "v.html", "--junit", "v.xml", "--markdown", "v.md")
    result = hetero_rl("verify-deploy", run / "artifact", *outputs, cwd=tmp_path)
    report = json.loads((tmp_path / "v.json").read_text())
    schema = json.loads((resources.files("deploy_targets") / "schemas" / "verify-report-1.json").read_text("utf-8"))
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)
    assert (tmp_path / "v.xml").read_text().count("<testcase") == len(report["gates"])
    assert (tmp_path / "v.md").read_text().startswith(f"## verify-deploy int4-onnx: {report['verdict']}")
    assert hetero_rl("compare", "v.json", "v.json", "--html", "both.html", cwd=tmp_path).returncode == 0
    fails(hetero_rl("compare", "v.json", "v.md", cwd=tmp_path), 2, "v.md", "cannot be read as a report")
    assert report["verdict"] in ("pass", "warn"), report["gates"]
    assert result.returncode == 0, result.stderr
    assert {"gap", "kl_k3", "greedy_agreement", "task_accuracy", "gates", "artifact_sha256", "engine", "hardware"} <= set(report)
    assert {"mean", "p99", "max", "interval"} <= set(report["gap"])
    assert report["task_accuracy"] == pytest.approx(read_metrics(run)[-1]["eval/deployed_accuracy"])
    assert report["gap"]["num_tokens"] >= 512
    num_probes = report["gap"]["num_sequences"] + sum(kind["num_sequences"] for kind in report["other_kinds"].values())
    assert report["measured"] == {"probes": num_probes, "num_probes": num_probes, "problems": 64, "num_problems": 64, "stopped": ""}
    assert (report["task_paired"]["num_pairs"], report["task_paired"]["lost"] + report["task_paired"]["gained"] <= 2) == (64, True)
    for measured in report["measures"].values():
        assert measured["value"] is None or measured["low"] <= measured["value"] <= measured["high"]
    assert report["cost"]["weights_bytes"] == (run / "artifact" / "model.safetensors").stat().st_size
    assert 0 < report["cost"]["first_token_s"] < report["seconds"]
    assert "<svg" in (tmp_path / "v.html").read_text()


def test_artifact_runs_unchanged_in_onnxruntime_genai(run: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    rows = [json.loads(line) for line in (run / "artifact" / "task_sample.jsonl").read_text().splitlines()[:8]]
    model, tokenizer = og.Model(str(run / "artifact")), Tokenizer.from_file(str(run / "artifact" / "tokenizer.json"))
    solved = 0
    for row in rows:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(row["prompt_tokens"]) + 8, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(row["prompt_tokens"])
        while not generator.is_done():
            generator.generate_next_token()
        # onnxruntime-genai's own tokenizer reads no word-level vocabulary, which the demo model has; tokens are what is compared.
        solved += tokenizer.decode(generator.get_sequence(0)[len(row["prompt_tokens"]) :]).strip() == row["columns"]["answer"]
    assert solved >= 2


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("suffix", ["weight_Q4", "weight_scales"])
def test_one_changed_byte_is_named(artifact: Path, tmp_path: Path, suffix: str) -> None:
    from deploy_targets.weights_file import tensor_layout

    name, (_, _, start, length) = next((n, e) for n, e in tensor_layout(artifact / "model.safetensors").items() if n.endswith(suffix))
    flip(artifact / "model.safetensors", start + length // 2)
    fails(hetero_rl("verify-deploy", artifact, cwd=tmp_path), 1, "model.safetensors", name)


def test_one_changed_manifest_line_is_named(artifact: Path, tmp_path: Path) -> None:
    manifest = artifact / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["tolerance"] *= 10
    manifest.write_text(json.dumps(changed, indent=2))
    fails(hetero_rl("verify-deploy", artifact, cwd=tmp_path), 1, "manifest.json", "tolerance")


def test_changed_probe_is_named(artifact: Path, tmp_path: Path) -> None:
    flip(artifact / "probes.st", (artifact / "probes.st").stat().st_size - 9)
    fails(hetero_rl("verify-deploy", artifact, cwd=tmp_path), 1, "probes.st")


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that was killed (SIGKILL) after its third step, its last whole checkpoint being of the second."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hetero_rl", *TRAIN, "--run-dir", "run"], cwd=tmp_path, env=environment_of({}), stdout=subprocess.DEVNULL
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-000002", checkpoints / "step-000003")
    os.truncate(next((checkpoints / "step-000003" / "learner").iterdir()), 1000)
    return tmp_path / "run"


@pytest.mark.fault("SIGKILL of the trainer, and a damaged newest checkpoint")
def test_resume_equals_uninterrupted(run: Path, killed: Path) -> None:
    assert not (killed / "artifact").exists()
    result = hetero_rl("train", "--resume", "--run-dir", killed, cwd=killed.parent)
    assert result.returncode == 0, result.stderr
    assert "step-000003 is damaged and left aside: learner/" in result.stdout
    assert [exact(row) for row in read_metrics(killed)] == [exact(row) for row in read_metrics(run)]
    assert sha256_of(killed / "artifact" / "model.safetensors") == sha256_of(run / "artifact" / "model.safetensors")


@pytest.mark.fault("resume with a changed setting that matters")
def test_resume_refuses_another_recipe(run: Path, tmp_path: Path) -> None:
    result = hetero_rl("train", "--resume", "--run-dir", run, "--set", "learner.lr=1.0", cwd=tmp_path)
    fails(result, 2, "learner.lr", "0.0001 -> 1.0")


@pytest.mark.fault("SIGTERM or SIGINT, and a second run on the folder meanwhile")
@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint(signum: int, exit_code: int, tmp_path: Path) -> None:
    settings = with_settings("loop.num_steps=500", "checkpoint.every_steps=400")
    process = subprocess.Popen(
        [sys.executable, "-m", "hetero_rl", *TRAIN, *settings, "--run-dir", "run"],
        cwd=tmp_path, env=environment_of({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    fails(hetero_rl("train", "--resume", "--run-dir", "run", cwd=tmp_path), 2, f"in use by process {process.pid} on")
    os.kill(process.pid, signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == exit_code, err
    assert "--resume" in out
    assert "Traceback" not in err
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert checkpoint.name == f"step-{last:06d}"


def test_a_signal_keeps_what_was_sampled_ahead(tmp_path: Path) -> None:
    """One step off, with no checkpoint on schedule: the rollouts under way are of weights that a resume has no more."""
    settings = with_settings(*SHORT_RUN, "loop.schedule=one_step_off", "loop.num_steps=10", "checkpoint.every_steps=100")
    command = ["train", "--target", "int4-onnx", *settings, "--run-dir"]
    whole = hetero_rl(*command, "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "hetero_rl", *command, "run"], cwd=tmp_path, env=environment_of({}), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    at_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143, out
    stopped_at = read_metrics(tmp_path / "run")[-1]["step"]
    assert load_state(tmp_path / "run" / "checkpoints" / f"step-{stopped_at:06d}").ahead is not None
    resumed = hetero_rl("train", "--resume", "--run-dir", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    rows, expected = (read_metrics(tmp_path / name) for name in ("run", "whole"))
    assert [exact(row) for row in rows] == [exact(row) for row in expected]
    assert all(row["constraint/staleness_gap"] > 0 for row in rows[2:])


@pytest.mark.parametrize(
    ("most_calls", "step"), [pytest.param(3, 1, id="of a step", marks=pytest.mark.variant), pytest.param(4, 2, id="of an evaluation")]
)
def test_a_reward_that_raises_costs_no_step(most_calls: int, step: int, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "import os\ncalls = 0\n\n\n"
        "def judge(completions, answer, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls > int(os.environ.get('MOST_CALLS', 1000)):\n"
        "        raise ConnectionError('judge is down')\n"
        "    return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]\n"
    )
    problems = "".join(json.dumps({"prompt": f"{a}+{a}=", "answer": str(2 * a)}) + "\n" for a in range(100, 400))
    (tmp_path / "problems.jsonl").write_text(problems)
    task = with_settings("task.type=dataset", "task.path=problems.jsonl", "task.reward=my_rewards:judge", "checkpoint.every_steps=100")
    environment = {"PYTHONPATH": str(tmp_path)}
    # Two calls for the first evaluation, one for each step, then another evaluation.
    failed = hetero_rl(*TRAIN, *task, "--run-dir", "run", cwd=tmp_path, **environment, MOST_CALLS=str(most_calls))
    fails(failed, 1, "judge is down")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    resumed = hetero_rl("train", "--resume", "--run-dir", "run", cwd=tmp_path, **environment)
    assert resumed.returncode == 0, resumed.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if row.get("eval/deployed_accuracy") is not None] == [0, 2, 4]


def test_nan_stops_the_step_and_not_the_run(tmp_path: Path) -> None:
    """Rewards whose sum is no number any more make NaN of all advantages of one step."""
    (tmp_path / "my_rewards.py").write_text(
        "calls = 0\n\n\n"
        "def judge(completions, answer, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 4:\n"
        "        return [3e38 for _ in completions]\n"
        "    return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]\n"
    )
    problems = "".join(json.dumps({"prompt": f"{a}+{a}=", "answer": str(2 * a)}) + "\n" for a in range(100, 400))
    (tmp_path / "problems.jsonl").write_text(problems)
    task = with_settings("task.type=dataset", "task.path=problems.jsonl", "task.reward=my_rewards:judge")
    # Two calls for the first evaluation, one for each step.
    result = hetero_rl(*TRAIN, *task, "--run-dir", "run", cwd=tmp_path, PYTHONPATH=python_path(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "warning: step 2: 1 optimizer steps were skipped" in result.stdout
    rows = read_metrics(tmp_path / "run")
    assert [row.get("learner/skipped_steps") for row in rows] == [None, 0, 1, 0, 0]
    assert [row["weights/version"] for row in rows[1:]] == [0, 1, 2, 3]
    assert all(row["learner/grad_norm"] is not None for row in rows[3:])


@pytest.mark.parametrize("signal_name", ["off", "loss", "advantage"])
def test_every_signal_runs(signal_name: str, tmp_path: Path) -> None:
    settings = with_settings(*SHORT_RUN, "loop.num_steps=2", f"constraint.signal={signal_name}", "algorithm.correction=mis_sequence")
    result = hetero_rl("train", "--target", "int4-onnx", *settings, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    row = read_metrics(tmp_path / "run")[-1]
    assert (row["constraint/cost"] > 0) is (signal_name == "loss")
    assert (row["constraint/lambda"] > 0) is (signal_name != "off")


def test_a_constraint_in_another_measure(tmp_path: Path) -> None:
    """The run is held by a KL over responses; its artifact is verified by abs(dp), to a bound as many floors away."""
    chosen = ("constraint.measure=k3", "constraint.aggregation=response", "constraint.tolerance=1.2", "constraint.signal=advantage")
    settings = with_settings(*SHORT_RUN, *chosen, "constraint.advantage_form=response_centered", "loop.publish_gate=3.0")
    result = hetero_rl("train", "--target", "int4-onnx", *settings, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, *_, last = read_metrics(tmp_path / "run")
    assert last["constraint/tolerance"] == pytest.approx(1.2 * first["constraint/floor"])
    assert 0.2 < last["constraint/engine_gap"] / last["constraint/kl_k3"] < 5
    manifest = read_manifest(tmp_path / "run" / "artifact")
    assert manifest.floor > 3 * first["constraint/floor"]
    assert manifest.tolerance == pytest.approx(1.2 * manifest.floor)


def test_several_updates_and_rare_publishes(tmp_path: Path) -> None:
    settings = with_settings(*SHORT_RUN, "loop.publish_every=2", "learner.updates_per_rollout=2")
    result = hetero_rl("train", "--target", "int4-onnx", *settings, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["weights/version"] for row in rows[1:]] == [0, 0, 1, 1]
    assert rows[2]["constraint/staleness_gap"] > 0


def test_one_step_off_lags_by_one_update_and_resumes_exactly(tmp_path: Path) -> None:
    settings = with_settings(*SHORT_RUN, "loop.schedule=one_step_off", "checkpoint.every_steps=2")
    result = hetero_rl("train", "--target", "int4-onnx", *settings, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["weights/version"] for row in rows[1:]] == [0, 0, 2, 2], "the step after a checkpoint samples for itself"
    assert [row["constraint/staleness_gap"] > 0 for row in rows[1:]] == [False, True, False, True]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "run" / "artifact")
    resumed = hetero_rl("train", "--resume", "--run-dir", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [exact(row) for row in read_metrics(tmp_path / "run")] == [exact(row) for row in rows]


def test_dataset_and_reward_from_outside(tmp_path: Path) -> None:
    """A dataset and a reward function written outside the project train with no change to the code."""
    rows = [{"question": f"{a}+{b}=", "solution": str(a + b), "topic": "sums"} for a in range(110, 990, 44) for b in range(120, 980, 86)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def judge(prompts, completions, solution, topic, **columns):\n"
        "    assert topic[0] == 'sums'\n"
        "    return [None if not c else float(c.strip() == s) for c, s in zip(completions, solution, strict=True)]\n"
    )
    (tmp_path / "mine.toml").write_text(
        '[task]\ntype = "dataset"\npath = "sums.jsonl"\nprompt_column = "question"\nanswer_column = "solution"\n'
        'reward = "my_rewards:judge"\n'
    )
    short = with_settings(*SHORT_RUN, "evaluation.num_final_problems=16")
    environment = {"PYTHONPATH": str(tmp_path)}
    result = hetero_rl("train", "--target", "int4-onnx", "--config", "mine.toml", *short, "--run-dir", "run", cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert read_metrics(tmp_path / "run")[-1]["reward/mean"] > 0
    without = hetero_rl("verify-deploy", "run/artifact", "--json", "a.json", cwd=tmp_path)
    assert "never run by itself" in without.stdout
    assert json.loads((tmp_path / "a.json").read_text())["task_accuracy"] is None
    hetero_rl("verify-deploy", "run/artifact", "--reward", "my_rewards:judge", "--json", "b.json", cwd=tmp_path, **environment)
    assert json.loads((tmp_path / "b.json").read_text())["task_accuracy"] > 0


def test_eval_and_report(run: Path, tmp_path: Path) -> None:
    result = hetero_rl("eval", run, "--json", "e.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert numbers["eval/deployed_accuracy"] == read_metrics(run)[-1]["eval/deployed_accuracy"]
    assert hetero_rl("report", run, "--out", "r.html", cwd=tmp_path).returncode == 0
    assert "<svg" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_the_weights_of_a_run_on_another_target(run: Path, tmp_path: Path) -> None:
    """Train against one target and deploy on another: what training in full precision and quantizing at the end needs."""
    measured = hetero_rl("eval", run, "--target", "fp32-onnx", "--json", "eval.json", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    numbers = json.loads((tmp_path / "eval.json").read_text())
    assert numbers["constraint/engine_gap"] < 1e-4 < read_metrics(run)[-1]["constraint/engine_gap"]
    assert numbers["eval/learner_accuracy"] == read_metrics(run)[-1]["eval/learner_accuracy"]
    exported = hetero_rl("export", run, "--target", "int8-onnx", "--bundle", "int8.tar.zst", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    verified = hetero_rl("verify-deploy", "int8.tar.zst", "--keep", "int8", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout
    assert json.loads((tmp_path / "int8" / "manifest.json").read_text())["profile"]["name"] == "int8-onnx"
    fails(hetero_rl("export", run, "--target", "int5-onnx", "--out", "none", cwd=tmp_path), 2, "int5-onnx")
    assert not (tmp_path / "none").exists()


def test_a_gate_that_nothing_passes_keeps_the_weights(tmp_path: Path) -> None:
    """Every step is undone: what is exported is what the run began with, published again and again."""
    result = hetero_rl(*TRAIN, "--set", "loop.publish_gate=1e-6", "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["publish/rejected"] for row in rows[1:]] == [1, 1, 1, 1]
    assert [row["weights/version"] for row in rows[1:]] == [0, 2, 4, 6]
    assert rows[0]["eval/deployed_accuracy"] == rows[-1]["eval/deployed_accuracy"]
    assert hetero_rl("verify-deploy", "run/artifact", cwd=tmp_path).returncode == 0
