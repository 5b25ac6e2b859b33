"""Artifacts without a manifest: what is found, what is refused, and what the report says of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from deploy_targets.artifact import PROBES_FILE
from deploy_targets.engines.fake import FakeEngine
from deploy_targets.errors import ArtifactError, UsageError
from deploy_targets.foreign import find_artifact, foreign_manifest
from deploy_targets.probes import ProbeSet, read_probes
from deploy_targets.profile import TargetProfile, load_profile
from deploy_targets.report import render_html
from deploy_targets.verify import verify
from deploy_targets.vocabulary import read_vocabulary
from deploy_targets.weights_file import sha256_of
from tests.artifacts import VERSION, make_artifact
from tests.conftest import TinyModels


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A model that the fake engine serves, made by nobody."""
    return Path(shutil.copytree(tiny_models("qwen2"), tmp_path / "foreign"))


@pytest.fixture
def probes(tiny_models: TinyModels, tmp_path: Path) -> ProbeSet:
    make_artifact(tiny_models("qwen2"), tmp_path / "ours")
    sha256 = read_vocabulary(tmp_path / "ours" / "tokenizer.json").sha256
    return replace(read_probes(tmp_path / "ours" / PROBES_FILE), source_model="tiny", vocab_size=36, vocabulary_sha256=sha256)


def fake(**changes: object) -> TargetProfile:
    return load_profile("fake").model_copy(update={"tolerance": 0.01, **changes})


def test_verification_without_a_manifest(folder: Path, probes: ProbeSet) -> None:
    manifest = foreign_manifest(folder, fake(), probes)
    assert not manifest.is_sealed
    assert (manifest.floor, manifest.task, manifest.final_gap, manifest.tolerance) == (None, None, None, 0.01)
    assert manifest.files["model.safetensors"].sha256 == sha256_of(folder / "model.safetensors")
    engine = FakeEngine(folder, {}, VERSION)
    report = verify(folder, engine, manifest, probes)
    assert report.verdict == "pass"
    found = report.to_json()
    assert (found["hashes_checked"], found["floor"], found["artifact_sha256"]) == (False, None, manifest.files_sha256())
    page = render_html(report)
    assert "no hash was checked" in page
    assert "Exported on" in page


def test_the_report_binds_to_the_bytes(folder: Path, probes: ProbeSet) -> None:
    before = foreign_manifest(folder, fake(), probes).files_sha256()
    assert before == foreign_manifest(folder, fake(), probes).files_sha256()
    (folder / "more.txt").write_text("x")
    assert before != foreign_manifest(folder, fake(), probes).files_sha256()


def test_probes_of_another_vocabulary(folder: Path, probes: ProbeSet) -> None:
    with pytest.raises(ArtifactError, match="vocabulary of 36 tokens, and the probes have one of 99: they are of another model"):
        foreign_manifest(folder, fake(), replace(probes, vocab_size=99))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 5}))
    with pytest.raises(ArtifactError, match="vocabulary of 5 tokens, and the probes have tokens up to"):
        foreign_manifest(folder, fake(), replace(probes, vocab_size=None))


def test_a_tokenizer_with_two_ids_swapped(folder: Path, probes: ProbeSet) -> None:
    written = json.loads((folder / "tokenizer.json").read_text())
    words = written["model"]["vocab"]
    words["3"], words["4"] = words["4"], words["3"]
    (folder / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json gives tokens other ids"):
        foreign_manifest(folder, fake(), probes)


def test_probes_longer_than_the_target_serves(folder: Path, probes: ProbeSet) -> None:
    with pytest.raises(UsageError, match="up to 24 tokens, and target 'fake' serves 20"):
        foreign_manifest(folder, fake(max_model_len=20), probes)


@pytest.mark.parametrize(
    ("target", "files", "missing"),
    [
        ("int4-onnx", ("model.onnx",), "genai_config.json"),
        ("int4-vllm", ("config.json", "pytorch_model.bin"), r"\*\.safetensors \(pickled weights are never loaded\)"),
        ("bf16-transformers", ("model.safetensors",), "config.json"),
        ("q4_k_m-llamacpp", ("a.gguf", "b.gguf"), "a.gguf, b.gguf"),
        ("q4_k_m-llamacpp", ("model.onnx",), "there is none"),
    ],
)
def test_folders_that_the_engine_does_not_open(target: str, files: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in files:
        (tmp_path / "a" / name).write_text("{}")
    with pytest.raises(ArtifactError, match=missing):
        find_artifact(tmp_path / "a", load_profile(target), tmp_path)


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("")
    for path in (tmp_path / "m.onnx", tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="is no folder"):
            find_artifact(path, load_profile("int4-onnx"), tmp_path)


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("config.json", "[]"), ("genai_config.json", "{}")])
def test_a_configuration_that_cannot_be_read(name: str, text: str, probes: ProbeSet, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text(text)
    profile = load_profile("int4-onnx" if name == "genai_config.json" else "fake").model_copy(update={"tolerance": 0.1})
    with pytest.raises(ArtifactError, match=f"{name} cannot be read"):
        foreign_manifest(tmp_path / "a", profile, probes)
