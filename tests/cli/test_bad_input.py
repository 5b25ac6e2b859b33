"""Bad input through the command line: one clear error, the documented exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetero_rl.config import load_config
from hetero_rl.metrics import read_metrics
from hetero_rl.run_folder import create_run
from tests.artifacts import make_artifact
from tests.command_line import SHORT_RUN, environment_of, fails, hetero_rl, with_settings
from tests.conftest import TinyModels

SHORT = with_settings(*SHORT_RUN)
FAKE = ("train", "--target", "fake", *SHORT)
"""For what goes wrong before a step: the fake engine serves no model, and so no proof holds."""


LEAVES_A_RUN = ("reward_function", "ctrl_c", "run_folder_that_holds_a_run")
"""Tests of what goes wrong once the run folder is there."""


@pytest.fixture(autouse=True)
def _no_run_folder_is_left(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever exits with 2 has made nothing."""
    yield
    assert not (tmp_path / "runs").exists()
    if not any(name in request.node.name for name in LEAVES_A_RUN):
        assert not (tmp_path / "run").exists()


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def dataset(folder: Path, rows: list[dict[str, object]]) -> Path:
    return write(folder / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


ROWS: list[dict[str, object]] = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(60)]


def test_unknown_target(tmp_path: Path) -> None:
    fails(
        hetero_rl("train", "--target", "int4-onx", cwd=tmp_path), 2, "unknown target 'int4-onx'", "Did you mean 'int4-onnx'?", "int4-vllm"
    )
    assert not list(tmp_path.iterdir())


def test_missing_profile_file(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--target", "mine.toml", cwd=tmp_path), 2, "mine.toml does not exist")


def test_profile_with_unknown_keys_lists_all(tmp_path: Path) -> None:
    profile = write(
        tmp_path / "mine.toml",
        'name = "x"\ndescription = "x"\nspeed = 3\n[engine]\nname = "fake"\n[scheme]\nquantizer = "none"\nbitz = 4\n',
    )
    fails(hetero_rl("train", "--target", profile, cwd=tmp_path), 2, "speed: unknown key", "scheme.bitz: unknown key")


def test_profile_with_unknown_engine(tmp_path: Path) -> None:
    profile = write(tmp_path / "mine.toml", 'name = "x"\ndescription = "x"\n[engine]\nname = "vlm"\n[scheme]\nquantizer = "none"\n')
    fails(hetero_rl("train", "--target", profile, *SHORT, cwd=tmp_path), 2, "unknown engine 'vlm'", "'vllm'")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("base", ["fake", "bf16-transformers", "nf4-transformers", "int4-onnx", "int4-vllm", "q4_0-llamacpp"])
def test_wrong_engine_options_are_found_before_anything_is_made(tmp_path: Path, base: str) -> None:
    text = f'name = "x"\ndescription = "x"\nextends = "{base}"\n[engine.options]\nspeed = 3\nmax_model_len = 0\n'
    profile = write(tmp_path / "mine.toml", text)
    for command in (("targets", "check", profile), ("train", "--target", profile)):
        result = hetero_rl(*command, cwd=tmp_path)
        assert result.returncode == (1 if command[0] == "targets" else 2), result.stderr
        for fragment in ("engine.options: speed: unknown key", "max_model_len"):
            assert fragment in " ".join((result.stdout + result.stderr).split())
        assert list(tmp_path.iterdir()) == [profile]


def test_missing_package_names_the_extra(tmp_path: Path) -> None:
    text = 'name = "x"\ndescription = "x"\n[engine]\nname = "fake"\n[scheme]\nquantizer = "none"\n'
    text += '[hardware]\npackages = ["no_such_runtime"]\nextra = "onnx"\n'
    result = hetero_rl("train", "--target", write(tmp_path / "mine.toml", text), cwd=tmp_path)
    fails(result, 2, "no_such_runtime", "hetero-rl[onnx]")


def test_offenders_of_every_kind_are_one_error(tmp_path: Path, tiny_models: TinyModels) -> None:
    text = 'name = "x"\ndescription = "x"\nextends = "int4-onnx"\n[engine.options]\nspeed = 3\n'
    profile = write(tmp_path / "mine.toml", text + '[hardware]\npackages = ["no_such_runtime"]\n')
    model = tiny_models("qwen3", hidden_size=112, intermediate_size=208, head_dim=28)
    settings = with_settings(f"model.path={model}", "loop.max_response_tokens=5000")
    result = hetero_rl("train", "--target", profile, *settings, cwd=tmp_path)
    fails(result, 2, "no_such_runtime", "speed: unknown key", "model.layers.0.self_attn.q_proj.weight", "5001 tokens")


@pytest.mark.parametrize("target", ["int4-onnx", "int4-vllm"])
def test_model_that_does_not_fit_the_scheme_lists_every_layer(tmp_path: Path, tiny_models: TinyModels, target: str) -> None:
    model = tiny_models("qwen3", hidden_size=112, intermediate_size=208, head_dim=28)
    result = hetero_rl("train", "--target", target, "--set", f"model.path={model}", "--run-dir", "run", cwd=tmp_path)
    linear = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    fails(result, 2, *(f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in linear))


def test_unknown_config_keys_are_all_listed(tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", "[loop]\nnum_step = 3\n[learner]\nlearning_rate = 1.0\n")
    result = hetero_rl("train", "--config", config, cwd=tmp_path)
    fails(result, 2, "loop.num_step: unknown key", "learner.learning_rate: unknown key", "Known keys of")


def test_unknown_task_key_lists_the_known(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--set", "task.digit=2", cwd=tmp_path), 2, "digit: unknown key", "digits")


def test_wrong_type(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--set", "loop.num_steps=many", cwd=tmp_path), 2, "loop.num_steps", "integer", "'many'")


def test_wrong_types_in_a_file_are_all_listed(tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", 'learner = 3\n[loop]\nnum_steps = 1.5\n[evaluation]\nevery_steps = "often"\n')
    fails(hetero_rl("train", "--config", config, cwd=tmp_path), 2, "learner", "loop.num_steps", "1.5", "evaluation.every_steps", "'often'")


def test_value_out_of_range(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--set", "learner.lr=-1", cwd=tmp_path), 2, "learner.lr", "greater than 0")


def test_updates_that_do_not_divide_the_prompts(tmp_path: Path) -> None:
    fails(
        hetero_rl("train", "--set", "learner.updates_per_rollout=7", cwd=tmp_path),
        2,
        "loop.prompts_per_step = 32",
        "updates_per_rollout = 7",
    )


def test_setting_without_equals(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--set", "loop.num_steps", cwd=tmp_path), 2, "table.key=value")


def test_broken_and_missing_config_files(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--config", write(tmp_path / "c.toml", "[loop\n"), cwd=tmp_path), 2, "not valid TOML")
    fails(hetero_rl("train", "--config", "none.toml", cwd=tmp_path), 2, "none.toml cannot be read")


def test_unknown_option(tmp_path: Path) -> None:
    assert hetero_rl("train", "--steps", "3", cwd=tmp_path).returncode == 2


def test_missing_model(tmp_path: Path) -> None:
    fails(hetero_rl(*FAKE, "--set", "model.path=./nowhere", cwd=tmp_path), 2, "there is no such folder")


def test_model_without_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "config.json", "{}")
    write(tmp_path / "pytorch_model.bin", "")
    fails(hetero_rl(*FAKE, "--set", f"model.path={tmp_path}", cwd=tmp_path), 2, "safetensors")


def test_missing_dataset_file(tmp_path: Path) -> None:
    settings = with_settings("task.type=dataset", "task.path=missing.jsonl")
    fails(hetero_rl("train", "--target", "fake", *settings, cwd=tmp_path), 2, "missing.jsonl")


def test_missing_dataset_column_lists_those_there_are(tmp_path: Path) -> None:
    path = dataset(tmp_path, [{"question": "1+1=", "answer": "2"}] * 30)
    settings = with_settings("task.type=dataset", f"task.path={path}")
    fails(hetero_rl("train", "--target", "fake", *settings, cwd=tmp_path), 2, "'prompt'", "question")


def test_missing_answers_for_a_reward_that_compares(tmp_path: Path) -> None:
    path = dataset(tmp_path, [{"prompt": f"{i}+1=", "solution": str(i + 1)} for i in range(30)])
    settings = with_settings("task.type=dataset", f"task.path={path}", "task.reward=exact")
    fails(hetero_rl("train", "--target", "fake", *settings, "--run-dir", "run", cwd=tmp_path), 2, "answer", "solution")


def test_empty_dataset(tmp_path: Path) -> None:
    settings = with_settings("task.type=dataset", f"task.path={dataset(tmp_path, [])}")
    fails(hetero_rl("train", "--target", "fake", *settings, cwd=tmp_path), 2, "data.jsonl", "no ")


@pytest.mark.parametrize(
    ("body", "fragments"),
    [
        ("raise KeyError('oh no')", ("oh no", "completion")),
        ("return [1.0]", ("gave 1 numbers for", "completion")),
        ("return ['good'] * len(completions)", ("good", "completion")),
    ],
)
def test_reward_function_that_misbehaves_shows_the_sample(tmp_path: Path, body: str, fragments: tuple[str, ...]) -> None:
    write(tmp_path / "my_rewards.py", f"def judge(prompts, completions, **columns):\n    {body}\n")
    settings = with_settings(*SHORT_RUN, "task.type=dataset", f"task.path={dataset(tmp_path, ROWS)}", "task.reward=my_rewards:judge")
    result = hetero_rl("train", *settings, "--run-dir", "run", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    fails(result, 1, "my_rewards:judge", *fragments)


def test_run_whose_reward_function_failed_at_once_resumes_when_it_is_mended(tmp_path: Path) -> None:
    """Before the first step there is no checkpoint: what the failure leaves is whole all the same."""
    judge = write(tmp_path / "my_rewards.py", "def judge(completions, **columns):\n    raise KeyError('oh no')\n")
    settings = with_settings(*SHORT_RUN, "task.type=dataset", f"task.path={dataset(tmp_path, ROWS)}", "task.reward=my_rewards:judge")
    run, path = tmp_path / "run", {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    fails(hetero_rl("train", *settings, "--run-dir", run, cwd=tmp_path, **path), 1, "oh no")
    assert not (run / "artifact").exists()
    assert not list(run.rglob("*.partial"))
    write(judge, "def judge(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    resumed = hetero_rl("train", "--resume", "--run-dir", run, cwd=tmp_path, **path)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in read_metrics(run)] == [0, 1, 2, 3, 4]


def test_ctrl_c_before_the_first_step(tmp_path: Path) -> None:
    """Nothing is learned yet; the run folder can be resumed."""
    command = [sys.executable, "-m", "hetero_rl", "train", *SHORT, "--run-dir", "run"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment_of({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert any("measuring the floor" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in out + err  # by the command line, or by the loop if it has begun by now
    assert "Traceback" not in err
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert not (tmp_path / "run" / "artifact").exists()
    resumed = hetero_rl("train", "--resume", "--run-dir", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_reward_that_does_not_exist(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--target", "fake", "--set", "task.reward=exakt", cwd=tmp_path), 2, "unknown reward 'exakt'", "'exact'")
    fails(hetero_rl("train", "--target", "fake", "--set", "task.reward=nowhere:judge", cwd=tmp_path), 2, "nowhere")


def test_run_folder_that_holds_a_run_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    kept = write(folder / "config.json", "{}")
    fails(hetero_rl(*FAKE, "--run-dir", folder, cwd=tmp_path), 2, "already holds a run", "--resume")
    assert list(folder.iterdir()) == [kept]
    assert kept.read_text() == "{}"


def test_unwritable_run_folder(tmp_path: Path) -> None:
    fails(hetero_rl(*FAKE, "--run-dir", "/proc/run", cwd=tmp_path), 2, "cannot be written")
    fails(hetero_rl(*FAKE, "--run-dir", write(tmp_path / "file", "x") / "run", cwd=tmp_path), 2, "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    fails(hetero_rl(*FAKE, "--run-dir", tmp_path / "run", cwd=tmp_path), 2, "cannot be written")


def test_what_lay_on_a_disk_is_not_resumed(tmp_path: Path) -> None:
    """DeepSpeed would begin again with the first weights, and say nothing."""
    settings = ["learner.offload=nvme", "learner.zero_stage=3", f"learner.nvme_path={tmp_path}"]
    create_run(tmp_path / "begun", *load_config([], settings, "int4-onnx"))
    for command in (("train", "--resume", "--run-dir", "begun"), ("export", "begun", "--out", "out"), ("eval", "begun")):
        fails(hetero_rl(*command, cwd=tmp_path), 2, "learner.offload = 'nvme'", "does not come back", "learner.offload = 'cpu'")


def test_resume_of_nothing(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--resume", cwd=tmp_path), 2, "--run-dir")
    fails(hetero_rl("train", "--resume", "--run-dir", "none", cwd=tmp_path), 2, "holds no run")


def test_response_longer_than_the_target_serves(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--target", "fake", "--set", "loop.max_response_tokens=5000", cwd=tmp_path), 2, "5001 tokens", "max_model_len")


def test_artifact_that_is_none(tmp_path: Path) -> None:
    fails(hetero_rl("verify-deploy", "nowhere", cwd=tmp_path), 1, "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    fails(hetero_rl("verify-deploy", "empty", cwd=tmp_path), 1, "manifest.json", "--probes FILE")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    fails(hetero_rl("verify-deploy", "some.gguf", cwd=tmp_path), 1, "GGUF", "--probes FILE")


def test_every_tampered_file_of_an_artifact_is_named(tmp_path: Path, tiny_models: TinyModels) -> None:
    artifact = tmp_path / "artifact"
    make_artifact(tiny_models("qwen3"), artifact, accuracy=None)
    whole = hetero_rl("verify-deploy", artifact, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr + whole.stdout
    config, tokenizer, probes = (artifact / name for name in ("config.json", "tokenizer.json", "probes.st"))
    write(config, config.read_text() + " ")
    tokenizer.unlink()
    probes.write_bytes(probes.read_bytes()[:-1])
    write(artifact / "extra.py", "")
    result = hetero_rl("verify-deploy", artifact, "--json", "v.json", "--html", "v.html", cwd=tmp_path)
    fails(result, 1, "config.json", "tokenizer.json", "probes.st", "extra.py")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_exit_codes_of_verdicts(tmp_path: Path, tiny_models: TinyModels) -> None:
    """0 for a pass, 3 for a fail, 4 where there are too few probes to decide: never 0."""
    shifted = {"shift": lambda logps: logps - 0.5, "tolerance": 0.001}
    for name, num_sequences, options, exit_code, verdict in (
        ("good", 20, {}, 0, "pass"), ("bad", 20, shifted, 3, "fail"),
        ("few", 9, {}, 4, "undecided"), ("few_and_bad", 9, shifted, 4, "undecided"),
    ):  # fmt: skip
        make_artifact(tiny_models("qwen3"), tmp_path / name, num_sequences=num_sequences, accuracy=None, **options)  # type: ignore[arg-type]
        result = hetero_rl("verify-deploy", tmp_path / name, "--json", f"{name}.json", cwd=tmp_path)
        assert result.returncode == exit_code, result.stderr + result.stdout
        assert verdict.upper() in result.stdout
        assert json.loads((tmp_path / f"{name}.json").read_text())["verdict"] == verdict


def test_gates_from_the_command_line(tmp_path: Path, tiny_models: TinyModels) -> None:
    artifact = tmp_path / "artifact"
    make_artifact(tiny_models("qwen3"), artifact, accuracy=None, shift=lambda logps: logps - 0.05, tolerance=0.001)
    assert hetero_rl("verify-deploy", artifact, cwd=tmp_path).returncode == 3
    changed = ("--gate", "gap_mean_fail=inf", "--gate", "gap_mean_warn=1e3")
    result = hetero_rl("verify-deploy", artifact, *changed, "--full", "--json", "v.json", "--html", "v.html", cwd=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "gap_mean_fail = inf instead of 1.5" in result.stdout
    assert "gap_mean_fail = inf instead of 1.5" in (tmp_path / "v.html").read_text()
    assert json.loads((tmp_path / "v.json").read_text())["gates_changed"]["gap_mean_fail"] == {"artifact": "1.5", "used": "inf"}


@pytest.mark.parametrize(
    ("gate", "fragments"),
    [
        ("gap_men_fail=2", ("unknown gate 'gap_men_fail'", "Did you mean 'gap_mean_fail'?", "accuracy_drop_warn", "greedy_agreement_fail")),
        ("gap_mean_fail", ("must be name=number",)),
        ("gap_mean_fail=lots", ("must be name=number", "gap_mean_fail=1.5")),
    ],
)
def test_gates_that_do_not_exist_are_found_before_anything_is_read(gate: str, fragments: tuple[str, ...], tmp_path: Path) -> None:
    fails(hetero_rl("verify-deploy", "nowhere", "--gate", gate, cwd=tmp_path), 2, *fragments)


def test_gates_that_do_not_go_together(tmp_path: Path, tiny_models: TinyModels) -> None:
    make_artifact(tiny_models("qwen3"), tmp_path / "artifact", accuracy=None)
    for gate, fragment in {"gap_mean_fail=0.5": "gap_mean_fail = 0.5 must be at least", "kl_k3_warn=nan": "nan is no bound"}.items():
        fails(hetero_rl("verify-deploy", "artifact", "--gate", gate, cwd=tmp_path), 2, fragment)


def test_report_and_export_of_nothing(tmp_path: Path) -> None:
    fails(hetero_rl("report", "nowhere", cwd=tmp_path), 2, "no run")
    fails(hetero_rl("export", "nowhere", "--out", "a", cwd=tmp_path), 2, "no run")
    fails(hetero_rl("eval", "nowhere", cwd=tmp_path), 2, "no run")


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = hetero_rl("train", "--target", "int4-onnx", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Nothing was started" in result.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_under_a_launcher(tmp_path: Path) -> None:
    """The ranks that follow wait for nobody."""
    result = hetero_rl("train", "--target", "int4-onnx", "--dry-run", cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_several_processes(tmp_path: Path) -> None:
    fails(hetero_rl(*FAKE, cwd=tmp_path, OMPI_COMM_WORLD_SIZE="2"), 2, "OMPI_COMM_WORLD_SIZE = 2", "torchrun")
    fails(hetero_rl("eval", "--target", "fake", cwd=tmp_path, WORLD_SIZE="2", RANK="1"), 2, "WORLD_SIZE = 2", "torchrun")


def test_settings_without_effect_are_named(tmp_path: Path) -> None:
    settings = with_settings("constraint.signal=off", "constraint.eta=0.2")
    result = hetero_rl(*FAKE, *settings, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "warning: constraint.eta has no effect: constraint.signal is 'off'" in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("verify-deploy", "artifact", "--json", "nowhere/v.json"),
        ("verify-deploy", "artifact", "--html", "nowhere/v.html"),
        ("eval", "--target", "fake", "--json", "nowhere/e.json"),
        ("report", "run", "--out", "nowhere/r.html"),
    ],
)
def test_output_that_cannot_be_written_is_found_first(command: tuple[str, ...], tmp_path: Path) -> None:
    fails(hetero_rl(*command, cwd=tmp_path), 2, "there is no folder nowhere")


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        (("learner.offload=cpu",), ("learner.offload = 'cpu' has nothing to move under learner.zero_stage = 0",)),
        (("learner.zero_stage=2", "learner.offload=cpu", "learner.offload_weights=true"), ("learner.offload_weights goes with",)),
        (("learner.zero_stage=2", "learner.offload=nvme", "learner.nvme_path=disk"), ("needs learner.zero_stage = 3, not 2",)),
        (("learner.zero_stage=3", "learner.offload=nvme"), ("learner.nvme_path and learner.offload = 'nvme' go together",)),
        (("learner.zero_stage=3", "learner.offload=nvme", "learner.nvme_path=disk"), ("'disk' is no folder that can be written",)),
        (("learner.num_ranks=2",), ("learner.num_ranks = 2 is for learner.launcher = 'ray'",)),
    ],
)
def test_offload_and_ranks_that_contradict_themselves(settings: tuple[str, ...], fragments: tuple[str, ...], tmp_path: Path) -> None:
    fails(hetero_rl("train", *with_settings(*settings), cwd=tmp_path), 2, *fragments)
