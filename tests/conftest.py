"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import Family, tiny_model

TinyModels = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def _offline() -> None:
    """No test may reach a hub."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """`tiny_models("qwen3", tied=True)`: the folder of a tiny checkpoint, made once per session. Tests must not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: Family, **options: object) -> Path:
        key = (family, repr(sorted(options.items())))
        if key not in made:
            made[key] = tiny_model(family, tmp_path_factory.mktemp(family), **options)  # type: ignore[arg-type]
        return made[key]

    return get
