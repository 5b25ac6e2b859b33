"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# As the command line sets them, before torch is imported: no hub, and threads that wait without burning a core.
os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"})

from tests.fault_log import pytest_collection_modifyitems, pytest_runtest_logreport, survived
from tests.models import Family, tiny_model
from tests.skips import pytest_make_collect_report, pytest_runtest_makereport

# Hooks that pytest finds here by their names.
__all__ = [
    "TinyModels",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_make_collect_report",
    "pytest_runtest_logreport",
    "pytest_runtest_makereport",
    "survived",
    "tiny_models",
]

TinyModels = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here and not in tests/contract: pytest asks only the files that it reads before its command line."""
    parser.addoption(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        help="a target, by its name or the path of its TOML file, which tests/contract runs on instead of the shipped ones; repeatable",
    )


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
