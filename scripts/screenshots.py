"""The pictures of verdicts in README: a pass, and a fail whose cause is named. Needs Chromium.

    python scripts/screenshots.py runs/RUN/artifact

The fail is the same artifact with the scales of two layers swapped and sealed anew, so that every hash fits.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.deploy_faults import reseal, swap_scales  # noqa: E402 - found once the root is on the path

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1000, 1180


def shoot(artifact: Path, name: str, browser: str) -> None:
    """Verify `artifact` and take the top of its page as `name`.png."""
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "verdict.html"
        subprocess.run([sys.executable, "-m", "hetero_rl", "verify-deploy", str(artifact), "--html", str(page)], check=False)
        window = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run([browser, *window, f"--screenshot={IMAGES / name}.png", page.as_uri()], check=True, capture_output=True)


def main() -> None:
    """Both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    options = parser.parse_args()
    shoot(options.artifact, "verdict-pass", options.browser)
    with tempfile.TemporaryDirectory() as scratch:
        damaged = Path(shutil.copytree(options.artifact, Path(scratch) / "artifact"))
        swap_scales(damaged)
        reseal(damaged)
        shoot(damaged, "verdict-fail", options.browser)


if __name__ == "__main__":
    main()
