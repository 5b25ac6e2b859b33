"""What every table of the config has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """A table: a key that it does not know is an error, and nothing of it changes once it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
