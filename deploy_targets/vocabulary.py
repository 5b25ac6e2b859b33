"""What a `tokenizer.json` says about a vocabulary: its fingerprint, its ordinary tokens. Needs the package tokenizers alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from deploy_targets.errors import ArtifactError

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer.

    `sha256`: of its (id, token) pairs in the order of ids, so that it does not change with how a tool writes the file.
    `ordinary_ids`: ids of the tokens that are not special, rising.
    """

    sha256: str
    ordinary_ids: tuple[int, ...]


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of the `tokenizer.json` at `path`, added tokens included. Raises `ArtifactError` when it cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the bare class for every malformed file
        raise ArtifactError(f"{path} is no readable tokenizer: {error}") from None
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    digest = hashlib.sha256()
    for token, index in sorted(ids.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return Vocabulary(digest.hexdigest(), tuple(sorted(set(ids.values()) - special)))
