"""The pictures of verdicts in README: a pass, and a fail whose cause is named. Needs Chromium.

    python scripts/screenshots.py runs/RUN/artifact                  docs/images/verdict-pass.png and verdict-fail.png
    python scripts/screenshots.py runs/RUN/artifact --all FOLDER     every view of both pages and of their comparison, to be looked at

The fail is the same artifact with the scales of two layers swapped and sealed anew, so that every hash fits. The views are those of a
phone and of a desktop, light and dark, and the page as it prints.
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
README_SIZE = (1000, 1180)
VIEWS = {"phone": (390, 7000), "desktop": (1280, 4600)}
SCHEMES = {"dark": 0, "light": 1}
"""Blink's numbers."""


def verify(artifact: Path, page: Path) -> None:
    """Write the verdict on `artifact` as `page`, and its JSON beside it."""
    command = [sys.executable, "-m", "hetero_rl", "verify-deploy", str(artifact), "--html", str(page)]
    subprocess.run([*command, "--json", str(page.with_suffix(".json"))], check=False)


def shoot(browser: str, page: Path, image: Path, size: tuple[int, int], scheme: str) -> None:
    """Take `page` as `image`, in a frame of its own: a window is never as narrow as a phone."""
    width, height = size
    frame = page.with_name("frame.html")
    style = f"border: 0; width: {width}px; height: {height}px"
    frame.write_text(f'<meta name="color-scheme" content="light dark"><body style="margin: 0"><iframe src="{page.name}" style="{style}">')
    chrome(
        browser,
        frame,
        f"--window-size={max(width, 600)},{height}",
        f"--screenshot={image}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    )


def chrome(browser: str, page: Path, *options: str) -> None:
    """Run `browser` on `page` without a window."""
    subprocess.run([browser, "--headless", "--no-sandbox", "--hide-scrollbars", *options, page.as_uri()], check=True, capture_output=True)


def main() -> None:
    """All pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pages = {name: Path(scratch) / f"{name}.html" for name in ("verdict-pass", "verdict-fail", "comparison")}
        damaged = Path(shutil.copytree(options.artifact, Path(scratch) / "artifact"))
        swap_scales(damaged)
        reseal(damaged)
        for artifact, page in ((options.artifact, pages["verdict-pass"]), (damaged, pages["verdict-fail"])):
            verify(artifact, page)
        if options.all is None:
            for name in ("verdict-pass", "verdict-fail"):
                shoot(options.browser, pages[name], IMAGES / f"{name}.png", README_SIZE, "light")
            return
        options.all.mkdir(parents=True, exist_ok=True)
        reports = [str(pages[name].with_suffix(".json")) for name in ("verdict-pass", "verdict-fail")]
        subprocess.run([sys.executable, "-m", "hetero_rl", "compare", *reports, "--html", str(pages["comparison"])], check=True)
        for name, page in pages.items():
            for view, size in VIEWS.items():
                for scheme in SCHEMES:
                    shoot(options.browser, page, options.all.resolve() / f"{name}-{view}-{scheme}.png", size, scheme)
            chrome(options.browser, page, f"--print-to-pdf={options.all.resolve() / name}.pdf", "--no-pdf-header-footer")


if __name__ == "__main__":
    main()
