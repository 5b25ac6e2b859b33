"""What every engine checks before it starts: its options and the requests it is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy_targets.errors import ArtifactError, EngineError, ProfileError, UsageError
from deploy_targets.profile import validation_lines
from deploy_targets.types import WEIGHTS_FILE, TokenSequence
from deploy_targets.weights_file import tensor_layout

LEAST_TOKENS_PER_PASS = 128
"""Fewer are not worth a pass of their own."""


class EngineOptions(BaseModel):
    """Options every engine has; each engine adds its own and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_model_len: int = Field(1024, ge=2)
    """Longest prompt + response in tokens; a model that ends earlier sets the limit."""

    def num_cached_sequences(self) -> int:
        """Sequences of the longest length that it keeps room for from its start on; 1 where its cache grows with what it is asked."""
        return 1

    def cache_bytes(self, value_bytes: float) -> float:
        """Bytes of a cached key or value, where the target keeps a value that is not quantized in `value_bytes`."""
        return value_bytes


OptionsT = TypeVar("OptionsT", bound=BaseModel)


def parse_options(options_class: type[OptionsT], options: Mapping[str, Any], engine: str) -> OptionsT:
    """Validate a profile's `[engine.options]`. Raises `ProfileError` with every offending key at once."""
    try:
        return options_class.model_validate(dict(options))
    except ValidationError as error:
        known = ", ".join(sorted(options_class.model_fields))
        raise ProfileError(f"the options of engine {engine!r} are not valid", validation_lines(error), f"known options: {known}") from None


def read_limits(artifact_dir: Path, max_model_len: int) -> tuple[int, int]:
    """The longest sequence that both the target and the model allow, in tokens, and the vocabulary size.

    Raises `ArtifactError` when `config.json` is missing, damaged or names no vocabulary size.
    """
    path = artifact_dir / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        vocab_size = int(config["vocab_size"])
    except (OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}. Make the folder again with the quantizer's scaffold") from error
    return min(max_model_len, int(config.get("max_position_embeddings") or max_model_len)), vocab_size


def response_limits(prompts: Sequence[Sequence[int]], max_tokens: int, max_model_len: int, vocab_size: int) -> list[int]:
    """How many tokens may follow each prompt: `max_tokens`, or fewer where `max_model_len` comes first.

    Raises `UsageError` that lists every prompt that is empty, leaves no room for a token, or is out of the vocabulary.
    """
    wrong = []
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            wrong.append(f"prompt {index} is empty")
        elif len(prompt) >= max_model_len:
            wrong.append(f"prompt {index}: {len(prompt)} tokens leave no room within max_model_len {max_model_len}")
        elif min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong.append(f"prompt {index} holds a token id outside [0, {vocab_size})")
    _raise_if(wrong, "prompts")
    return [min(max_tokens, max_model_len - len(prompt)) for prompt in prompts]


def check_sequences(sequences: Sequence[TokenSequence], temperature: float, max_model_len: int, vocab_size: int) -> None:
    """Raise `UsageError` that lists every sequence that cannot be scored, or for a temperature that is not positive."""
    if not temperature > 0:
        raise UsageError(f"scores need a positive temperature, got {temperature}; greedy tokens are scored at temperature 1")
    wrong = []
    for index, sequence in enumerate(sequences):
        if len(sequence.tokens) > max_model_len:
            wrong.append(f"sequence {index}: {len(sequence.tokens)} tokens > max_model_len {max_model_len}")
        elif min(sequence.tokens) < 0 or max(sequence.tokens) >= vocab_size:
            wrong.append(f"sequence {index} holds a token id outside [0, {vocab_size})")
    _raise_if(wrong, "sequences")


def _raise_if(wrong: list[str], what: str) -> None:
    if wrong:
        raise UsageError(f"{len(wrong)} of the {what} cannot be served:\n{_first_lines(wrong)}")


def _first_lines(wrong: list[str]) -> str:
    more = [f"  and {len(wrong) - 10} more"] if len(wrong) > 10 else []
    return "\n".join([*(f"  - {line}" for line in wrong[:10]), *more])


Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors dtype, shape)."""


def read_layout(path: Path) -> Layout:
    """What a safetensors file holds. Raises `EngineError` when it cannot be read."""
    try:
        return {name: (dtype, shape) for name, (dtype, shape, _, _) in tensor_layout(path).items()}
    except (OSError, ValueError, KeyError, MemoryError) as error:
        raise EngineError(f"{path} cannot be read as a safetensors file: {error!r}") from error


def folder_layout(folder: Path) -> Layout:
    """What the weights of a folder hold, in one safetensors file or, as other tools write them, in shards. Raises as `read_layout`."""
    files = [folder / WEIGHTS_FILE]
    if not files[0].is_file():
        files = sorted(folder.glob("*.safetensors")) or files
    return {name: entry for file in files for name, entry in read_layout(file).items()}


def check_layout(expected: Layout, path: Path) -> None:
    """Raise `EngineError` that names every tensor in which the file `path` differs from what the engine serves.

    It is called before anything is swapped: a wrong file leaves the old version in service.
    """
    compare_layouts(expected, read_layout(path), path)


def compare_layouts(expected: Layout, given: Layout, path: Path) -> None:
    """What `check_layout` raises, where the file `path` holds the tensors `given`."""
    if given == expected:
        return
    wrong = [f"{name}: missing" for name in expected if name not in given]
    wrong += [f"{name}: unknown to the model" for name in given if name not in expected]
    wrong += [
        f"{name}: {given[name][0]} {list(given[name][1])}, the engine has {expected[name][0]} {list(expected[name][1])}"
        for name in expected
        if name in given and given[name] != expected[name]
    ]
    raise EngineError(f"{path} does not fit the model in service; nothing was changed:\n{_first_lines(wrong)}")


def even_tokens(lengths: Sequence[int], most: int, num_parallel: int) -> int:
    """Tokens of one pass over sequences of these `lengths`, at most `most`: `num_parallel` workers have as many passes each.

    A few sequences would else be one pass, and three passes of two workers take as long as four.
    """
    rounds = max(1, -(-sum(lengths) // (most * num_parallel)))
    # A sequence is not cut: with room for one more, none is left over for a pass of its own.
    share = -(-sum(lengths) // (rounds * num_parallel)) + max(lengths, default=0)
    return min(most, max(LEAST_TOKENS_PER_PASS, share))
