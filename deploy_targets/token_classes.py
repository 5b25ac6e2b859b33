"""What kind of text a token is, by the artifact's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy_targets.errors import ArtifactError

TOKEN_CLASSES = ("digit", "letter", "punctuation or space", "special", "other")
"""By the characters of the token's text, spaces around it left out: all decimal digits; all letters; none of either, or nothing but space;
a token that the tokenizer calls special (end of text, chat markers); anything else, such as a mixture or a part of a character."""
_DIGIT, _LETTER, _PUNCTUATION, _SPECIAL, _OTHER = range(len(TOKEN_CLASSES))
_PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def token_classes(artifact_dir: Path, token_ids: NDArray[np.int32]) -> NDArray[np.int_] | None:
    """Index into `TOKEN_CLASSES` of each token, int [num_tokens]; None where the artifact has no tokenizer.json."""
    tokenizer = load_tokenizer(artifact_dir)
    if tokenizer is None:
        return None
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    unique, where = np.unique(token_ids, return_inverse=True)
    texts = tokenizer.decode_batch([[int(token)] for token in unique], skip_special_tokens=False)
    kinds = [_SPECIAL if int(token) in special else class_of(text) for token, text in zip(unique, texts, strict=True)]
    return np.array(kinds, dtype=int)[where]


def load_tokenizer(artifact_dir: Path) -> Any:
    """The `tokenizers.Tokenizer` of the artifact; None where it has none. Raises `ArtifactError` for one that cannot be read."""
    from tokenizers import Tokenizer

    path = artifact_dir / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no class of its own
        raise ArtifactError(f"{path} cannot be read by the installed tokenizers: {error}. Upgrade that package") from error


def class_of(text: str) -> int:
    """Index into `TOKEN_CLASSES` of a token that is not special, by its text."""
    text = text.strip()
    if _PART_OF_A_CHARACTER in text:
        return _OTHER
    if not any(character.isalnum() for character in text):
        return _PUNCTUATION
    return _DIGIT if text.isdecimal() else _LETTER if text.isalpha() else _OTHER
