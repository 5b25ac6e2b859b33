"""What a task is: problems out, rewards back. Text and token ids meet here and nowhere else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from deploy_targets.errors import UsageError

if TYPE_CHECKING:
    from hetero_rl.tasks.rewards import Reward

Message: TypeAlias = Mapping[str, str]
"""One chat message: {"role": ..., "content": ...}."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, its right answer, and the other columns of the sample it came from.

    `prompt`: text, or chat messages. `answer`: text the built-in rewards compare with, "" where there is none.
    `columns`: what user reward functions get by name; the prompt is not among them.
    """

    prompt: str | tuple[Message, ...]
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that tasks use."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> Any:
        """Text of `token_ids`."""
        ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool = True, add_generation_prompt: bool = False) -> Any:
        """The text of a conversation, ready for the assistant's answer."""
        ...


class Task(ABC):
    """Problems to train and to be tested on, and how answers are rewarded.

    There is nothing to checkpoint: problems follow from (seed, step).
    """

    def __init__(self, tokenizer: Tokenizer, reward: Reward) -> None:
        """Both are only read."""
        self._tokenizer = tokenizer
        self._reward = reward

    @abstractmethod
    def train_problems(self, step: int, num: int) -> list[Problem]:
        """The `num` problems of training step `step` (from 0): the same for the same (seed, step, num)."""

    @abstractmethod
    def heldout_problems(self, num: int) -> list[Problem]:
        """`num` problems that are never trained on, whatever the seed; fewer when there are no more.

        A smaller `num` gives the beginning of what a larger one gives.
        """

    @abstractmethod
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt there is; what a target must have room for besides the response."""

    def encode_prompt(self, problem: Problem) -> tuple[int, ...]:
        """Token ids of the prompt; see `encode_prompt`."""
        return encode_prompt(self._tokenizer, problem.prompt)

    def decode_completions(self, completions: Iterable[Sequence[int]]) -> list[str]:
        """Text of sampled tokens, special tokens (the end-of-text token) left out."""
        return [self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True) for tokens in completions]

    def reward(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[float | None]:
        """One reward per completion, None for a sample to be dropped; problem i belongs to completion i.

        Raises:
            RewardError: a reward function raised, or gave something other than one number or None per completion.
        """
        return self._reward(problems, completions)


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[Message]) -> tuple[int, ...]:
    """Token ids of a prompt: chat messages through the chat template, text as the tokenizer encodes it on its own.

    Raises:
        UsageError: messages for a tokenizer without a chat template, or a prompt without a single token.
    """
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt)
    else:
        if not tokenizer.chat_template:
            raise UsageError(
                "the prompt is a list of chat messages, but the model's tokenizer has no chat template. "
                "Use a chat model, or a prompt column that holds text"
            )
        # The template writes the special tokens itself; the tokenizer must not add them a second time.
        text = tokenizer.apply_chat_template([dict(message) for message in prompt], tokenize=False, add_generation_prompt=True)
        tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise UsageError(f"the prompt {prompt!r} has no tokens; an engine needs at least one")
    return tuple(tokens)
