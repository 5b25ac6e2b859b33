"""A vocabulary's fingerprint follows from its tokens and their ids, and from nothing else in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from deploy_targets.errors import ArtifactError
from deploy_targets.vocabulary import read_vocabulary
from tests.models import BOS_ID, EOS_ID, PAD_ID, save_tokenizer


def test_special_tokens_are_not_ordinary(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path)
    vocabulary = read_vocabulary(tmp_path / "tokenizer.json")
    assert set(vocabulary.ordinary_ids) == set(range(size)) - {PAD_ID, BOS_ID, EOS_ID}


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    sha256, written = read_vocabulary(path).sha256, json.loads(path.read_text())
    Tokenizer.from_file(str(path)).save(str(tmp_path / "again.json"), pretty=False)
    assert (tmp_path / "again.json").read_bytes() != path.read_bytes()
    assert read_vocabulary(tmp_path / "again.json").sha256 == sha256
    words = written["model"]["vocab"]
    words["3"], words["4"] = words["4"], words["3"]
    path.write_text(json.dumps(written))
    assert read_vocabulary(path).sha256 != sha256


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    for name in ("t.json", "none.json"):
        with pytest.raises(ArtifactError, match="no readable tokenizer"):
            read_vocabulary(tmp_path / name)
