"""Made once, kept whole, and never in the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy_targets.cache import CACHE_VARIABLE, cache_folder, kept


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def writes(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "a").write_text(text)

    return make


def test_made_once_for_equal_keys() -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text(str(len(made)))

    assert [path.read_text() for path in kept("things", {"x": 1}, make)] == ["1"]
    assert [path.read_text() for path in kept("things", {"x": 1}, make)] == ["1"]
    assert [path.read_text() for path in kept("things", {"x": 2}, make)] == ["2"]
    assert [path.read_text() for path in kept("others", {"x": 1}, make)] == ["3"]
    assert not any(folder.exists() for folder in made)


def test_what_fails_is_not_kept(cache: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        kept("things", 1, fails)
    assert not list((cache / "things").iterdir())
    assert [path.name for path in kept("things", 1, lambda folder: (folder / "whole").touch())] == ["whole"]


def test_the_first_of_two_is_kept() -> None:
    def make(folder: Path) -> None:
        (folder / "a").write_text("late")
        kept("things", 1, writes("early"))

    assert [path.read_text() for path in kept("things", 1, make)] == ["early"]


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file")
    assert [path.read_text() for path in kept("things", 1, writes("made"))] == ["made"]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hetero-rl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "hetero-rl"
