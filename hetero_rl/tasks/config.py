"""The `[task]` table: what is asked and what counts as right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Operation = Literal["+", "-", "*"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RewardTerm(_Table):
    """One term of a weighted sum of rewards."""

    name: str
    """`exact`, `digits`, `numeric`, `math_verify`, or your own `module:function`."""
    weight: float = 1.0
    """Factor of this term in the sum."""


class _TaskTable(_Table):
    reward: str | tuple[RewardTerm, ...] = "exact"
    """A reward by name, or a list of {name, weight} to be summed (docs of `hetero_rl.tasks.rewards`)."""
    reward_timeout_s: float | None = Field(None, gt=0)
    """Seconds that a call of your own reward function may take; one that hangs then ends the run with its checkpoint saved. It is
    called in a thread of its own where this is set."""

    @field_validator("reward")
    @classmethod
    def at_least_one_term(cls, reward: str | tuple[RewardTerm, ...]) -> str | tuple[RewardTerm, ...]:
        """An empty list would give every sample the reward 0."""
        if not reward:
            raise ValueError("reward needs at least one name")
        return reward

    @property
    def reward_terms(self) -> tuple[RewardTerm, ...]:
        """`reward` as terms, whichever way it was written."""
        return (RewardTerm(name=self.reward),) if isinstance(self.reward, str) else self.reward


class ArithmeticConfig(_TaskTable):
    """`[task] type = "arithmetic"`: generated problems such as `123+456=`; the demo."""

    type: Literal["arithmetic"] = "arithmetic"
    """Selects this kind of task."""
    digits: int = Field(3, ge=1, le=12)
    """Digits of both numbers."""
    operations: tuple[Operation, ...] = Field(("+",), min_length=1)
    """Operations to draw from, each equally often."""


class DatasetConfig(_TaskTable):
    """`[task] type = "dataset"`: prompts and answers from a file, a folder or the hub."""

    type: Literal["dataset"]
    """Selects this kind of task."""
    path: str
    """A `.jsonl` or `.parquet` file, a folder written by `datasets` (`save_to_disk`), or a hub id."""
    split: str | None = None
    """Split of a hub dataset or a saved `DatasetDict`; unset: `train`. Files have no splits, so it is an error there."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or chat messages as a list of {role, content}."""
    answer_column: str = "answer"
    """Column with the right answer (text or number). Rewards get it as `answer`. Needed by the built-in ones only."""
    heldout_path: str | None = None
    """Where held-out problems come from: anything `path` may be. Unset: `heldout_fraction` of `path` is kept aside."""
    heldout_split: str | None = None
    """Split of `heldout_path`; unset: `test`."""
    heldout_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the distinct prompts of `path` kept aside when there is no `heldout_path`; unset: 0.1."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Problems with a longer prompt are left out, with a warning that counts them."""

    @model_validator(mode="after")
    def one_source_of_heldout_problems(self) -> DatasetConfig:
        """A setting that would be ignored is refused."""
        if self.heldout_path is not None and self.heldout_fraction is not None:
            raise ValueError("heldout_path and heldout_fraction exclude each other: give one of them")
        if self.heldout_path is None and self.heldout_split is not None:
            raise ValueError("heldout_split needs heldout_path")
        return self


def _type_of(task: Any) -> Any:
    """The `type` of a `[task]` table; a table without one is the default task, so that `--set task.digits=2` works."""
    return task.get("type", "arithmetic") if isinstance(task, Mapping) else getattr(task, "type", None)


TaskConfig = Annotated[
    Annotated[ArithmeticConfig, Tag("arithmetic")] | Annotated[DatasetConfig, Tag("dataset")],
    Discriminator(_type_of),
]
