"""What many agents are sent is made once, and is right."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deploy_targets.deltas import unpack
from deploy_targets.engines import outbox as module
from deploy_targets.engines.outbox import NUM_KEPT, Outbox

SIZE, ASKING = 200_000, 16


def version(folder: Path, number: int) -> Path:
    """A file of which a hundredth differs from that of any other number."""
    rng = np.random.default_rng(0)
    content, others = rng.integers(0, 256, SIZE, np.uint8), np.random.default_rng(number)
    content[others.integers(0, SIZE, SIZE // 100)] ^= 255
    path = folder / f"v{number}"
    path.write_bytes(content.tobytes())
    return path


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """Calls of a function of the module, each as slow as those who ask at once need to meet."""
    calls: list[object] = []
    function = getattr(module, name)

    def count(*arguments: object) -> object:
        calls.append(arguments)
        threading.Event().wait(0.1)
        return function(*arguments)

    monkeypatch.setattr(module, name, count)
    return calls


def test_however_many_ask_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, packed = counted(monkeypatch, "sha256_of"), counted(monkeypatch, "packed")
    old, new = version(tmp_path, 1), version(tmp_path, 2)
    box = Outbox()
    box.keep(old, box.sha256(old))
    (base,) = box.bases

    def ask(index: int) -> bytes:
        delta = box.difference(new, box.sha256(new), base)
        assert delta is not None
        with delta:
            return delta.read()

    with ThreadPoolExecutor(ASKING) as threads:
        deltas = set(threads.map(ask, range(ASKING)))
    assert (len(hashed), len(packed), len(deltas)) == (2, 1, 1)
    delta = deltas.pop()
    assert len(delta) < SIZE / 10
    assert unpack(io.BytesIO(delta), tmp_path / "out", old, SIZE) == box.sha256(new)
    assert (tmp_path / "out").read_bytes() == new.read_bytes()


def test_the_last_versions_are_kept_even_when_their_files_go(tmp_path: Path) -> None:
    box = Outbox()
    hashes: list[str] = []
    for number in range(4):
        path = version(tmp_path, number)
        hashes.append(box.sha256(path))
        for base in box.bases:
            delta = box.difference(path, hashes[-1], base)
            assert delta is not None
            delta.close()
        box.keep(path, hashes[-1])
        path.unlink()
    assert box.bases == hashes[: -NUM_KEPT - 1 : -1]
    assert box.difference(version(tmp_path, 9), "9", hashes[0]) is None
    folder = Path(box._folder.name)
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == set(box.bases)
    del box
    assert not folder.exists()


def test_a_version_that_is_served_again_is_the_newest(tmp_path: Path) -> None:
    box, paths = Outbox(), [version(tmp_path, number) for number in range(2)]
    hashes = [box.sha256(path) for path in paths]
    for index in (0, 1, 0):
        box.keep(paths[index], hashes[index])
    assert box.bases == hashes


def test_what_is_no_shorter_goes_whole(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    rng = np.random.default_rng(0)
    for path in (old, new):
        path.write_bytes(rng.bytes(SIZE))
    box = Outbox()
    box.keep(old, box.sha256(old))
    assert box.difference(new, box.sha256(new), box.bases[0]) is None


def test_a_failure_is_everybodys_and_no_longer_than_it_lasts() -> None:
    box = Outbox()
    calls: list[int] = []

    def fails() -> str:
        calls.append(1)
        threading.Event().wait(0.1)
        raise OSError(28, "No space left on device")

    with ThreadPoolExecutor(ASKING) as threads:
        asked = [threads.submit(box._once, "key", fails) for _ in range(ASKING)]
    assert {type(each.exception()) for each in asked} == {OSError}
    assert len(calls) < ASKING
    assert box._once("key", lambda: "made") == "made"
