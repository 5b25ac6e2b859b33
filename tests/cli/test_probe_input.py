"""What `probe` and `verify-deploy --probes` are given wrongly: one clear error each, before anything heavy starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.artifacts import make_artifact
from tests.command_line import fails, hetero_rl
from tests.conftest import TinyModels


@pytest.fixture
def model(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models("qwen3"), tmp_path / "model"))


def test_models_that_cannot_be_probed(model: Path, tmp_path: Path) -> None:
    out = ("--out", "p.st")
    fails(hetero_rl("probe", "./nowhere", *out, cwd=tmp_path), 2, "there is no such folder")
    (tmp_path / "empty").mkdir()
    fails(hetero_rl("probe", "empty", *out, cwd=tmp_path), 2, "holds no config.json")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 500
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    fails(hetero_rl("probe", model, *out, cwd=tmp_path), 2, "ids beyond the model's vocabulary of 36", "'beyond' with id 500")
    (model / "tokenizer.json").unlink()
    fails(hetero_rl("probe", model, *out, cwd=tmp_path), 2, "tokenizer.json is missing")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    fails(hetero_rl("probe", model, *out, cwd=tmp_path), 2, "no *.safetensors weights; pickled weights are never loaded")
    assert not (tmp_path / "p.st").exists()


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ("line 1",)),
        ('{"prompt": ""}\n{"prompt": 3}\n', ("line 1", "has no tokens", "line 2", "text or a list of chat messages")),
        ('{"prompt": "1", "prompt_tokens": [3]}', ("either the key prompt or the key prompt_tokens",)),
        ('{"prompt_tokens": []}\n{"prompt_tokens": [-1]}\n{"text": "1"}', ("line 1", "line 2", "line 3", "one token id or more")),
        ('{"prompt": [{"role": "user", "content": "hi"}]}', ("has no chat template",)),
        ('{"prompt_tokens": [36]}', ("token id 36", "vocabulary has 36")),
        (json.dumps({"prompt_tokens": [3] * 490}), ("a prompt of 490 tokens with a response of up to 64 is longer than 512", "--target")),
    ],
)
def test_prompts_that_cannot_be_used(text: str, fragments: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    fails(hetero_rl("probe", model, "--out", "p.st", "--prompts", "prompts.jsonl", cwd=tmp_path), 2, *fragments)
    assert not (tmp_path / "p.st").exists()


def test_arguments_of_probe_that_do_not_go_together(model: Path, tmp_path: Path) -> None:
    fails(hetero_rl("probe", model, "--out", "p.st", "--prompts", "none.jsonl", cwd=tmp_path), 2, "none.jsonl cannot be read")
    fails(hetero_rl("probe", model, "--out", "no/p.st", cwd=tmp_path), 2, "there is no folder no")
    both = ("--prompts", "p.jsonl", "--set", "task.digits=2")
    fails(hetero_rl("probe", model, "--out", "p.st", *both, cwd=tmp_path), 2, "not both")
    fails(hetero_rl("probe", model, "--out", "p.st", "--target", "int5-onnx", cwd=tmp_path), 2, "unknown target 'int5-onnx'")


def test_arguments_of_verification_that_do_not_go_together(tiny_models: TinyModels, model: Path, tmp_path: Path) -> None:
    make_artifact(tiny_models("qwen3"), tmp_path / "ours", accuracy=None)
    probes, fake = ("--probes", tmp_path / "ours" / "probes.st"), ("--target", "fake")
    fails(hetero_rl("verify-deploy", "ours", *probes, *fake, cwd=tmp_path), 2, "has a manifest", "leave out --probes")
    fails(hetero_rl("verify-deploy", model, *fake, cwd=tmp_path), 2, "no manifest", "--probes FILE")
    fails(hetero_rl("verify-deploy", model, *probes, cwd=tmp_path), 2, "no manifest", "--target NAME")
    fails(hetero_rl("verify-deploy", model, *probes, *fake, cwd=tmp_path), 2, "names no tolerance", "--tolerance")
    fails(hetero_rl("verify-deploy", model, "--probes", "none", *fake, "--tolerance", "0.1", cwd=tmp_path), 1, "no readable probes")
    for unwanted in (("--reward", "numeric_answer"), ("--keep", "kept")):
        fails(hetero_rl("verify-deploy", model, *probes, *fake, *unwanted, cwd=tmp_path), 2, f"{unwanted[0]}: only for an artifact with")
    found = hetero_rl("verify-deploy", model, *probes, *fake, "--tolerance", "0.1", cwd=tmp_path)
    assert found.returncode == 0, found.stderr + found.stdout
    profile = tmp_path / "mine.toml"
    profile.write_text('name = "mine"\ndescription = "d"\nextends = "fake"\ntolerance = 1e-9\n[engine.options]\nnan_logps = 0.5\n')
    bad = hetero_rl("verify-deploy", model, *probes, "--target", profile, "--json", "v.json", cwd=tmp_path)
    assert bad.returncode == 3, bad.stderr + bad.stdout
    assert json.loads((tmp_path / "v.json").read_text())["tolerance"] == 1e-9
