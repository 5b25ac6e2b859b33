"""A skipped test is no passed test: `tests/skips.py`, in a pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.skips import REQUIRE_ALL

ROOT = Path(__file__).parents[2]
MISSING = {
    "body": "def test():\n    pytest.importorskip('no_such_engine')\n",
    "call": "def test():\n    pytest.skip('int4-onnx needs onnxruntime')\n",
    "mark": "@pytest.mark.skipif(True, reason='vllm is not installed')\ndef test():\n    pass\n",
    "fixture": "@pytest.fixture\ndef part():\n    pytest.skip('no bitsandbytes')\n\ndef test(part):\n    pass\n",
    "target": "def test():\n    pytest.skip(\"int4-onnx cannot run here: package 'onnxruntime' is not installed\")\n",
    "file": "pytest.importorskip('no_such_engine')\n\ndef test():\n    pass\n",
}
PRESENT = {
    "gpu": "@pytest.mark.skipif(True, reason='needs a GPU')\ndef test():\n    pass\n",
    "device": "def test():\n    pytest.skip('int4-onnx-cuda cannot run here: it needs a CUDA GPU, none is here; no onnxruntime')\n",
    "root": "def test():\n    pytest.skip('root may write everywhere')\n",
    "expected_failure": "@pytest.mark.xfail(reason='vllm is not installed')\ndef test():\n    raise AssertionError\n",
}


def outcomes(folder: Path, bodies: dict[str, str], require_all: str) -> dict[str, str]:
    """What a pytest with one file for each body says about it: "SKIPPED", "FAILED", "ERROR" (a file not collected) or "XFAIL"."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name, body in bodies.items():
        (folder / f"test_{name}.py").write_text(f"import pytest\n\n{body}")
    options = [
        "-p",
        "tests.skips",
        "-p",
        "no:cacheprovider",
        "-c",
        "pytest.ini",
        "--continue-on-collection-errors",
        "--no-fold-skipped",
        "-ra",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", REQUIRE_ALL: require_all}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    found = re.findall(r"^(SKIPPED|FAILED|ERROR|XFAIL)\b.*?test_(\w+)\.py", result.stdout, re.MULTILINE)
    return {name: outcome for outcome, name in found}


def test_missing_part_fails_where_everything_is_required(tmp_path: Path) -> None:
    expected = {"body": "FAILED", "call": "FAILED", "target": "FAILED", "mark": "ERROR", "fixture": "ERROR", "file": "ERROR"}
    assert outcomes(tmp_path, MISSING, "1") == expected
    assert outcomes(tmp_path, MISSING, "0") == dict.fromkeys(MISSING, "SKIPPED")


def test_what_no_installation_changes_may_skip(tmp_path: Path) -> None:
    assert outcomes(tmp_path, PRESENT, "1") == {"gpu": "SKIPPED", "device": "SKIPPED", "root": "SKIPPED", "expected_failure": "XFAIL"}


def test_the_test_script_requires_everything() -> None:
    assert f"{REQUIRE_ALL}=1" in (ROOT / "scripts" / "test.sh").read_text("utf-8")
