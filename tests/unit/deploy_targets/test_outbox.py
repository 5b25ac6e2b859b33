"""What many agents are sent is made once, and is right."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deploy_targets.deltas import unpack
from deploy_targets.engines import outbox as module
from deploy_targets.engines.outbox import NUM_HELD, Outbox

SIZE, ASKING = 200_000, 16


def version(folder: Path, number: int) -> Path:
    """A file of which a hundredth differs from that of any other number."""
    rng = np.random.default_rng(0)
    content, others = rng.integers(0, 256, SIZE, np.uint8), np.random.default_rng(number)
    content[others.integers(0, SIZE, SIZE // 100)] ^= 255
    path = folder / f"v{number}"
    path.write_bytes(content.tobytes())
    return path


def slowed(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    """Calls of a function, each so slow that those who ask at once meet."""
    calls: list[object] = []
    function = getattr(owner, name)

    def slow(*arguments: object) -> object:
        calls.append(arguments)
        threading.Event().wait(0.1)
        return function(*arguments)

    monkeypatch.setattr(owner, name, slow)
    return calls


def test_however_many_ask_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, packed = slowed(monkeypatch, hashlib, "file_digest"), slowed(monkeypatch, module, "packed")
    old, new = version(tmp_path, 1), version(tmp_path, 2)
    box = Outbox()
    base, _ = box.hold(old)

    def ask(index: int) -> bytes:
        sha256, path = box.hold(new)
        assert box.bases(sha256) == [base]
        delta = box.difference(path, sha256, base)
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


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_what_is_held_stays_whatever_comes_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    box, published = Outbox(), tmp_path / "weights"
    hashes: list[str] = []
    for number in range(4):
        content = version(tmp_path, number).read_bytes()
        os.replace(tmp_path / f"v{number}", published)
        sha256, held = box.hold(published)
        assert (sha256, held.read_bytes()) == (hashlib.sha256(content).hexdigest(), content)
        for base in box.bases(sha256):
            delta = box.difference(held, sha256, base)
            assert delta is not None
            delta.close()
        hashes.append(sha256)
    assert box.bases("another") == hashes[: -NUM_HELD - 1 : -1]
    assert box.difference(held, hashes[-1], hashes[0]) is None
    folder = box.folder
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {*hashes[-NUM_HELD:]}
    del box
    assert not folder.exists()


def test_another_version_that_comes_between_hash_and_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publish in the middle of a restart: what is sent is what was hashed."""
    published, later = version(tmp_path, 1), version(tmp_path, 2)
    content, link = published.read_bytes(), os.link

    def published_meanwhile(source: Path, target: Path) -> None:
        os.replace(later, published)
        link(source, target)

    monkeypatch.setattr(os, "link", published_meanwhile)
    box = Outbox()
    sha256, held = box.hold(published)
    assert (sha256, held.read_bytes()) == (hashlib.sha256(content).hexdigest(), content)


def test_a_version_that_is_held_again_is_the_newest(tmp_path: Path) -> None:
    box, paths = Outbox(), [version(tmp_path, number) for number in range(2)]
    hashes = [box.hold(paths[index])[0] for index in (0, 1, 0)]
    assert box.bases("another") == hashes[:2]


def test_what_is_no_shorter_goes_whole(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    rng = np.random.default_rng(0)
    for path in (old, new):
        path.write_bytes(rng.bytes(SIZE))
    box = Outbox()
    base, _ = box.hold(old)
    assert box.difference(new, box.sha256(new), base) is None


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
