"""docs/targets.md says what is there: its tables, its examples, its links. `make_docs.py --check` holds what is generated."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from deploy_targets.profile import load_profile, parse_profile, shipped_profiles

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "targets.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    """The part under the heading `## title`."""
    _, found, rest = PAGE.partition(f"\n## {title}\n")
    assert found, title
    return rest.partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_shipped_target_has_its_row() -> None:
    shipped = {file.stem for file in (ROOT / "deploy_targets" / "profiles").glob("*.toml")}
    assert shipped <= set(shipped_profiles())
    listed = section("The shipped targets")
    assert first_cells(listed) == sorted(shipped)
    for name in shipped:
        profile = load_profile(name)
        assert f"| `{name}` | {profile.scheme.name} | {profile.engine.name} | {profile.engine.publish} | {profile.description} |" in listed


def test_every_test_of_the_contract_has_its_line() -> None:
    suite = ast.parse((ROOT / "tests" / "contract" / "test_engines.py").read_text("utf-8"))
    tests = [node.name for node in suite.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert len(tests) > 10
    assert first_cells(section("What every engine has to prove")) == tests


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_is_a_profile(text: str) -> None:
    profile = parse_profile(text, "mine.toml")
    assert profile.name not in shipped_profiles()


def test_there_is_an_example() -> None:
    assert EXAMPLES


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert "example_plugin" in links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    named = re.findall(r"`((?:deploy_targets|hetero_rl|tests|scripts)/[\w./]+)`", PAGE)
    assert [path for path in named if not (ROOT / path).exists()] == []
