"""Files from outside with anything in them: an error of ours or success, never another exception, never a write."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy_targets.artifact import MANIFEST_FILE, PROBES_FILE
from deploy_targets.errors import DeployTargetsError
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
PROFILES = sorted(shipped_profiles())
pytestmark = pytest.mark.timeout(3600 if NUM_INPUTS > 10_000 else 120)


@pytest.fixture(scope="module")
def artifact(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "artifact"
    make_artifact(tiny_models("qwen3"), folder)
    return folder


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


@FUZZED
@given(draw=st.data())
def test_manifest(artifact: Path, tmp_path: Path, draw: st.DataObject) -> None:
    """A manifest of any bytes; or one that is valid JSON with hashes that fit, and another value somewhere."""
    original = (artifact / MANIFEST_FILE).read_bytes()
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


@FUZZED
@given(draw=st.data())
def test_profile(tmp_path: Path, draw: st.DataObject) -> None:
    text = profile_text(draw.draw(st.sampled_from(PROFILES)))
    lines = text.splitlines()
    if draw.draw(st.booleans()):
        place = draw.draw(st.integers(0, len(lines) - 1))
        lines[place] = lines[place].partition("=")[0] + "= " + json.dumps(draw.draw(JSON))
        text = "\n".join(lines)
    else:
        text = changed(draw, text.encode()).decode("utf-8", "replace")
    survives(lambda: parse_profile(text, "fuzzed.toml"), tmp_path)


@FUZZED
@given(draw=st.data())
def test_probes(artifact: Path, tmp_path: Path, draw: st.DataObject) -> None:
    original = (artifact / PROBES_FILE).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    # The header is where such a file can lie.
    data = changed(draw, original[:header]) + original[header:] if draw.draw(st.booleans()) else changed(draw, original)
    (tmp_path / PROBES_FILE).write_bytes(data)
    survives(lambda: read_probes(tmp_path / PROBES_FILE), tmp_path)
