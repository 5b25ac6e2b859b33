"""What the documents tell a reader to type works: commands are parsed by the real command tree, the config example is dry-run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from deploy_targets.profile import load_profile, parse_profile, shipped_profiles
from hetero_rl.cli import app
from hetero_rl.config import load_config
from tests.command_line import hetero_rl

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/targets.md", "docs/deploy.md", "docs/verify.md", "docs/probes.md", "hetero_rl/cli.py")


def commands_in(text: str) -> list[str]:
    """Every `hetero-rl ...` that a document shows: a line of a code block, inline code, or an example of `--help`."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = re.findall(r"^hetero-rl .*$", blocks, re.MULTILINE)
    inline = re.findall(r"(?<!`)`(hetero-rl [^`\n]+)`(?!`)", text)
    examples = [part for line in re.findall(r'epilog="Examples?:  (.*)"', text) for part in line.split("   ·   ")]
    return [*lines, *inline, *examples]


def parse(command_line: str) -> None:
    """Parse with the program's own commands and options, running nothing. Raises what the command line would."""
    words = shlex.split(command_line.split(" > ")[0], comments=True)
    assert words.pop(0) == "hetero-rl"
    command, name = get_command(app), "hetero-rl"
    while isinstance(command, typer.core.TyperGroup):
        name = words.pop(0)
        assert name in command.commands, f"{command_line}: there is no command {name!r}"
        command = command.commands[name]
    command.make_context(name, words)


COMMANDS = sorted({command for document in DOCUMENTS for command in commands_in((ROOT / document).read_text("utf-8"))})


def test_commands_are_found() -> None:
    """Guards the search itself: the main ways to use the program are among what it finds."""
    shown = {command.split()[1] for command in commands_in(README)}
    assert {"train", "verify-deploy", "targets"} <= shown
    assert {"train", "verify-deploy", "probe", "targets", "export", "eval", "report", "doctor"} <= {
        command.split()[1] for command in COMMANDS
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one_the_program_knows(command: str) -> None:
    parse(command)


@pytest.mark.parametrize("command", ["hetero-rl train --steps 3", "hetero-rl targets check a b", "hetero-rl export --out a"])
def test_parser_refuses_what_the_program_refuses(command: str) -> None:
    with pytest.raises(Exception, match=r"No such option|unexpected extra argument|Missing parameter"):
        parse(command)


def test_generated_docs_are_up_to_date() -> None:
    result = subprocess.run([sys.executable, ROOT / "scripts" / "make_docs.py", "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_config_parses(path: Path) -> None:
    config, _ = load_config([path], [], None)
    written = tomllib.loads(path.read_text("utf-8"))
    resolved = config.model_dump(mode="json")
    assert {table: {key: resolved[table][key] for key in keys} for table, keys in written.items()} == written


def toml_examples() -> tuple[str, str]:
    """The README's config and its profile."""
    config, profile = re.findall(r"^```toml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return config, profile


def test_profile_example_is_accepted() -> None:
    _, example = toml_examples()
    made = parse_profile(example, "mine.toml")
    assert made.scheme.group_size == 128
    assert made.scheme.name == load_profile("int4-vllm").scheme.name


def test_every_target_has_its_place_in_the_table() -> None:
    (table,) = re.findall(r"## Targets\n\n(.*?)\n\n", README, re.DOTALL)
    rows = table.splitlines()[2:]
    for name, profile in shipped_profiles().items():
        if name != "fake":
            (row,) = [row for row in rows if f"`{name}`" in row]
            engine = row.split("|")[1].strip().lower().replace(" ", "").replace(".", "")
            assert engine == profile.engine.name, name
    assert set(re.findall(r"`([a-z0-9_-]+)`", table)) | {"fake"} == set(shipped_profiles())


def test_config_example_is_accepted(tmp_path: Path) -> None:
    """The README's mine.toml, with a model and a dataset that are here, under the README's own command."""
    example, _ = toml_examples()
    written = tomllib.loads(example)
    for old, new in {written["model"]["path"]: "demo", written["task"]["path"]: "made.jsonl"}.items():
        assert example.count(f'"{old}"') == 1
        example = example.replace(f'"{old}"', f'"{new}"')
    (tmp_path / "mine.toml").write_text(example, "utf-8")
    # The columns that the example's comment shows.
    assert '{"prompt": "...", "answer": "..."}' in example
    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(100, 160)]
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (command,) = [command for command in commands_in(README) if command.startswith("hetero-rl train") and "mine.toml" in command]
    result = hetero_rl(*shlex.split(command, comments=True)[1:], "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    resolved, _ = json.JSONDecoder().raw_decode(result.stdout, result.stdout.index("{"))
    expected = tomllib.loads(example)
    assert {table: {key: resolved[table][key] for key in keys} for table, keys in expected.items()} == expected
    assert not (tmp_path / "runs").exists()
