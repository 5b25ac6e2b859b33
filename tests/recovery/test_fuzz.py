"""Files from outside with anything in them: an error of ours or success, never another exception, never a write."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy_targets.artifact import MANIFEST_FILE, PROBES_FILE, check_artifact
from deploy_targets.bundle import unpack_bundle, write_bundle
from deploy_targets.errors import ArtifactError, DeployTargetsError
from deploy_targets.manifest import read_manifest
from deploy_targets.probes import read_probes
from deploy_targets.profile import parse_profile, profile_text, shipped_profiles
from tests.artifacts import make_artifact
from tests.conftest import TinyModels

NUM_INPUTS = int(os.environ.get("HETERO_RL_TESTS_FUZZ", "300"))
FUZZED = settings(
    max_examples=NUM_INPUTS, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["../x", "/etc/passwd", "a" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PROFILES = {name: profile_text(name) for name in sorted(shipped_profiles())}
pytestmark = pytest.mark.timeout(300 + NUM_INPUTS // 10)
Survived = Callable[[int], None]


@pytest.fixture(scope="module")
def artifact(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "artifact"
    make_artifact(tiny_models("qwen3"), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What is in its archive, below the compression."""
    path = tmp_path_factory.mktemp("packed") / "out.tar.zst"
    write_bundle(artifact, path)
    return zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()


def fuzz(one: Callable[[st.DataObject], None], survived: Survived) -> None:
    """Call `one` with as many draws as are asked for, and note how many it took."""
    num = 0

    @FUZZED
    @given(draw=st.data())
    def check(draw: st.DataObject) -> None:
        nonlocal num
        one(draw)
        num += 1

    try:
        check()
    finally:
        survived(num)


def survives(read: Callable[[], object], folder: Path) -> None:
    """`read` fails by an error of ours or not at all, and leaves the folder as it was."""
    before = sorted(folder.rglob("*"))
    with suppress(DeployTargetsError):
        read()
    assert sorted(folder.rglob("*")) == before


def changed(draw: st.DataObject, data: bytes) -> bytes:
    """Some bytes replaced, some cut out or put in."""
    bytes_ = bytearray(data)
    for place, new in draw.draw(st.lists(st.tuples(st.integers(0, len(data)), st.binary(max_size=6)), max_size=6)):
        bytes_[place : place + draw.draw(st.integers(0, 6))] = new
    return bytes(bytes_)


@pytest.mark.fault("manifest of changed bytes or values, hashes made to fit")
def test_manifest(artifact: Path, tmp_path: Path, survived: Survived) -> None:
    original = (artifact / MANIFEST_FILE).read_bytes()
    fuzz(lambda draw: read_a_manifest(original, tmp_path, draw), survived)


def read_a_manifest(original: bytes, tmp_path: Path, draw: st.DataObject) -> None:
    """One of any bytes; or one that is valid JSON with hashes that fit, and another value somewhere."""
    if draw.draw(st.booleans()):
        data = changed(draw, original)
    else:
        entries = json.loads(original)
        name = draw.draw(st.sampled_from([*entries, "other"]))
        entries[name] = replaced(draw, entries.get(name))
        if isinstance(entries["entry_sha256"], dict):
            hashed = json.dumps(entries[name], sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
            entries["entry_sha256"][name] = hashlib.sha256(hashed).hexdigest()
        data = (json.dumps(entries, indent=2) + "\n").encode()
    (tmp_path / MANIFEST_FILE).write_bytes(data)
    survives(lambda: read_manifest(tmp_path), tmp_path)


def replaced(draw: st.DataObject, value: Any) -> Any:
    """`value` with something else in place of it, or of one thing in it."""
    if isinstance(value, dict) and value and draw.draw(st.booleans()):
        name = draw.draw(st.sampled_from(sorted(value)))
        return {**value, name: replaced(draw, value[name])}
    return draw.draw(JSON)


@pytest.mark.fault("target profile of changed bytes or values")
def test_profile(tmp_path: Path, survived: Survived) -> None:
    fuzz(lambda draw: read_a_profile(tmp_path, draw), survived)


def read_a_profile(tmp_path: Path, draw: st.DataObject) -> None:
    text = PROFILES[draw.draw(st.sampled_from(list(PROFILES)))]
    lines = text.splitlines()
    if draw.draw(st.booleans()):
        place = draw.draw(st.integers(0, len(lines) - 1))
        lines[place] = lines[place].partition("=")[0] + "= " + json.dumps(draw.draw(JSON))
        text = "\n".join(lines)
    else:
        text = changed(draw, text.encode()).decode("utf-8", "replace")
    survives(lambda: parse_profile(text, "fuzzed.toml"), tmp_path)


@pytest.mark.fault("probes file of changed bytes")
def test_probes(artifact: Path, tmp_path: Path, survived: Survived) -> None:
    original = (artifact / PROBES_FILE).read_bytes()
    fuzz(lambda draw: read_some_probes(original, tmp_path, draw), survived)


def read_some_probes(original: bytes, tmp_path: Path, draw: st.DataObject) -> None:
    header = 8 + int.from_bytes(original[:8], "little")
    # The header is where such a file can lie.
    data = changed(draw, original[:header]) + original[header:] if draw.draw(st.booleans()) else changed(draw, original)
    (tmp_path / PROBES_FILE).write_bytes(data)
    survives(lambda: read_probes(tmp_path / PROBES_FILE), tmp_path)


@pytest.mark.fault("bundle whose archive has changed bytes or is cut off")
def test_no_archive_escapes_or_stays(bundle: bytes, tmp_path: Path, survived: Survived) -> None:
    fuzz(lambda draw: unpack_a_bundle(bundle, tmp_path, draw), survived)


def unpack_a_bundle(archive: bytes, around: Path, draw: st.DataObject) -> None:
    """Whatever is changed in the archive below the compression: the same artifact, or one error and nothing left."""
    original = bytearray(archive)
    # Headers are where an archive can lie: the first blocks, and the last ones.
    places = st.integers(0, min(len(original), 1 << 12) - 1) | st.integers(len(original) - (1 << 15), len(original) - 1)
    for place, value in draw.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        original[place] = value
    if draw.draw(st.booleans()):
        fix_checksum(original)
    length = draw.draw(st.sampled_from([len(original)]) | st.integers(0, len(original)))
    folder = around / "place"
    folder.mkdir(exist_ok=True)
    path = folder / "fuzzed.tar.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(bytes(original[:length])))
    try:
        unpack_bundle(path, folder / "artifact")
    except ArtifactError:
        assert sorted(around.rglob("*")) == [folder, path]
    else:
        check_artifact(folder / "artifact")
        assert sorted(around.iterdir()) == [folder]
        assert sorted(folder.iterdir()) == [folder / "artifact", path]
        shutil.rmtree(folder / "artifact")


def fix_checksum(data: bytearray) -> None:
    """Of the first header, so that the rest of it is believed."""
    header = bytes(data[:512])
    total = sum(header[:148]) + sum(header[156:]) + 8 * 32
    data[148:156] = b"%06o\0 " % total
