"""Token classes by text, and by a real tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from deploy_targets.errors import ArtifactError
from deploy_targets.token_classes import TOKEN_CLASSES, class_of, token_classes
from tests.conftest import TinyModels
from tests.models import EOS_ID


@pytest.mark.parametrize(
    ("text", "name"),
    [("7", "digit"), (" 42", "digit"), ("word", "letter"), (" Wörter", "letter"), ("語", "letter"), (".", "punctuation or space"),
     (" ", "punctuation or space"), ("\n\n", "punctuation or space"), ("", "punctuation or space"), ("+=", "punctuation or space"),
     ("don't", "other"), ("x2", "other"), ("½", "other"), ("a\N{REPLACEMENT CHARACTER}", "other"), ("\N{REPLACEMENT CHARACTER}", "other")],
)  # fmt: skip
def test_classes_of_texts(text: str, name: str) -> None:
    assert TOKEN_CLASSES[class_of(text)] == name


def test_classes_of_tokens(tiny_models: TinyModels) -> None:
    folder = tiny_models("qwen2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [tokenizer.token_to_id("7"), EOS_ID, tokenizer.token_to_id("a"), tokenizer.token_to_id("="), tokenizer.token_to_id("7")]
    classes = token_classes(folder, np.array(tokens, np.int32))
    assert classes is not None
    assert [TOKEN_CLASSES[index] for index in classes] == ["digit", "special", "letter", "punctuation or space", "digit"]


def test_without_a_tokenizer_there_are_no_classes(tmp_path: Path) -> None:
    assert token_classes(tmp_path, np.array([1, 2], np.int32)) is None


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read"):
        token_classes(tmp_path, np.array([1], np.int32))
