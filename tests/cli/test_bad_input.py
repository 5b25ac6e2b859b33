"""Bad input through the command line: one clear error, the documented exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import SHORT_RUN, fails, hetero_rl, with_settings
from tests.conftest import TinyModels

SHORT = with_settings(*SHORT_RUN)
FAKE = ("train", "--target", "fake", *SHORT)


@pytest.fixture(autouse=True)
def _no_run_folder_is_left(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever exits with 2 has made nothing; only a reward that fails in the middle leaves a run."""
    yield
    if "reward_function_that_misbehaves" not in request.node.name:
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "run" / "environment.json").exists()


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


def test_missing_package_names_the_extra(tmp_path: Path) -> None:
    text = 'name = "x"\ndescription = "x"\n[engine]\nname = "fake"\n[scheme]\nquantizer = "none"\n'
    text += '[hardware]\npackages = ["no_such_runtime"]\nextra = "onnx"\n'
    result = hetero_rl("train", "--target", write(tmp_path / "mine.toml", text), cwd=tmp_path)
    fails(result, 2, "no_such_runtime", "hetero-rl[onnx]")


@pytest.mark.parametrize("target", ["int4-onnx", "int4-vllm"])
def test_model_that_does_not_fit_the_scheme_lists_every_layer(tmp_path: Path, tiny_models: TinyModels, target: str) -> None:
    model = tiny_models("qwen3", hidden_size=112, intermediate_size=208, head_dim=28)
    result = hetero_rl("train", "--target", target, "--set", f"model.path={model}", "--run-dir", "run", cwd=tmp_path)
    fails(result, 2, *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")))


def test_unknown_config_keys_are_all_listed(tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", "[loop]\nnum_step = 3\n[learner]\nlearning_rate = 1.0\n")
    result = hetero_rl("train", "--config", config, cwd=tmp_path)
    fails(result, 2, "loop.num_step: unknown key", "learner.learning_rate: unknown key", "Known keys of")


def test_unknown_task_key_lists_the_known(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--set", "task.digit=2", cwd=tmp_path), 2, "digit: unknown key", "digits")


def test_wrong_type(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--set", "loop.num_steps=many", cwd=tmp_path), 2, "loop.num_steps", "integer", "'many'")


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


def test_empty_dataset(tmp_path: Path) -> None:
    settings = with_settings("task.type=dataset", f"task.path={dataset(tmp_path, [])}")
    fails(hetero_rl("train", "--target", "fake", *settings, cwd=tmp_path), 2, "data.jsonl", "no ")


@pytest.mark.parametrize(
    ("body", "fragments"),
    [
        ("raise KeyError('oh no')", ("oh no", "completion")),
        ("return [1.0]", ("gave 1 numbers for",)),
        ("return ['good'] * len(completions)", ("good",)),
    ],
)
def test_reward_function_that_misbehaves_shows_the_sample(tmp_path: Path, body: str, fragments: tuple[str, ...]) -> None:
    write(tmp_path / "my_rewards.py", f"def judge(prompts, completions, **columns):\n    {body}\n")
    settings = with_settings(*SHORT_RUN, "task.type=dataset", f"task.path={dataset(tmp_path, ROWS)}", "task.reward=my_rewards:judge")
    result = hetero_rl("train", "--target", "fake", *settings, "--run-dir", "run", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    fails(result, 1, "my_rewards:judge", *fragments)


def test_reward_that_does_not_exist(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--target", "fake", "--set", "task.reward=exakt", cwd=tmp_path), 2, "unknown reward 'exakt'", "'exact'")
    fails(hetero_rl("train", "--target", "fake", "--set", "task.reward=nowhere:judge", cwd=tmp_path), 2, "nowhere")


def test_run_folder_that_holds_a_run_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder / "config.json", "{}")
    fails(hetero_rl(*FAKE, "--run-dir", folder, cwd=tmp_path), 2, "already holds a run", "--resume")
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_unwritable_run_folder(tmp_path: Path) -> None:
    fails(hetero_rl(*FAKE, "--run-dir", "/proc/run", cwd=tmp_path), 2, "cannot be written")
    fails(hetero_rl(*FAKE, "--run-dir", write(tmp_path / "file", "x") / "run", cwd=tmp_path), 2, "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    fails(hetero_rl(*FAKE, "--run-dir", tmp_path / "run", cwd=tmp_path), 2, "cannot be written")


def test_resume_of_nothing(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--resume", cwd=tmp_path), 2, "--run-dir")
    fails(hetero_rl("train", "--resume", "--run-dir", "none", cwd=tmp_path), 2, "holds no run")


def test_response_longer_than_the_target_serves(tmp_path: Path) -> None:
    fails(hetero_rl("train", "--target", "fake", "--set", "loop.max_response_tokens=5000", cwd=tmp_path), 2, "5001 tokens", "max_model_len")


def test_artifact_that_is_none(tmp_path: Path) -> None:
    fails(hetero_rl("verify-deploy", "nowhere", cwd=tmp_path), 1, "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    fails(hetero_rl("verify-deploy", "empty", cwd=tmp_path), 1, "manifest.json")


def test_report_and_export_of_nothing(tmp_path: Path) -> None:
    fails(hetero_rl("report", "nowhere", cwd=tmp_path), 2, "no run")
    fails(hetero_rl("export", "nowhere", "--out", "a", cwd=tmp_path), 2, "no run")
    fails(hetero_rl("eval", "nowhere", cwd=tmp_path), 2, "no run")


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = hetero_rl("train", "--target", "int4-onnx", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Nothing was started" in result.stdout
    assert not list(tmp_path.iterdir())


def test_several_processes(tmp_path: Path) -> None:
    fails(hetero_rl(*FAKE, cwd=tmp_path, WORLD_SIZE="2", RANK="1"), 2, "WORLD_SIZE = 2", "torchrun")


def test_settings_without_effect_are_named(tmp_path: Path) -> None:
    settings = with_settings("constraint.signal=off", "constraint.eta=0.2")
    result = hetero_rl(*FAKE, *settings, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "warning: constraint.eta has no effect: constraint.signal is 'off'" in result.stdout
