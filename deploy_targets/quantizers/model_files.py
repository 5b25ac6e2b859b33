"""What every target takes over from the model folder besides the weights: config, tokenizer, generation config."""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy_targets.errors import ArtifactError

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files transformers may save next to the weights of a text model; those that exist are copied."""


def read_config(model_dir: Path) -> dict[str, Any]:
    """The parsed `config.json` of `model_dir`. Raises `ArtifactError` when it is missing or damaged."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as the config of a Hugging Face model: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} holds no JSON object")
    return config


def write_model_files(model_dir: Path, out_dir: Path, config: Mapping[str, Any]) -> None:
    """Write `config` as `out_dir/config.json` and copy the tokenizer and generation config of `model_dir` beside it."""
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    for name in _COPIED:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, out_dir / name)


def is_tied_copy(name: str, model_config: Mapping[str, Any]) -> bool:
    """Whether the tensor `name` is the output head of a model that shares it with the embedding.

    Such a head is stored once, as the embedding, as transformers does.
    """
    return name == "lm_head.weight" and bool(model_config.get("tie_word_embeddings"))


def is_ignored(module: str, ignore: Iterable[str]) -> bool:
    """Whether `ignore` names `module`: exactly, or by a regular expression after `re:` that matches from the start."""
    return any(re.match(entry[3:], module) is not None if entry.startswith("re:") else entry == module for entry in ignore)


def unmatched_ignores(ignore: Sequence[str], modules: Iterable[str]) -> list[str]:
    """A line for each entry of `ignore` that keeps nothing, as it names none of `modules`; the nearest names are suggested."""
    names = sorted(set(modules))
    lines = []
    for entry in ignore:
        if any(is_ignored(name, (entry,)) for name in names):
            continue
        near = [] if entry.startswith("re:") else difflib.get_close_matches(entry, names, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f", e.g. {names[0]!r}" if names else ""
        lines.append(f"scheme.ignore {entry!r}: matches no module of the model{hint}")
    return lines
