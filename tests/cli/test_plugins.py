"""Plug-ins that are broken or take a name: one clear error for who asks for them, nothing for everybody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_targets.catalog import open_engine, resolve
from deploy_targets.errors import PlugInError, PreflightError, ProfileError
from deploy_targets.preflight import check_target, preflight
from deploy_targets.profile import load_profile, parse_profile
from tests.command_line import fails, hetero_rl
from tests.conftest import TinyModels
from tests.plugins import lay_out, profile, python_path

BROKEN = "raise RuntimeError('out of order')\n"
TARGETS: dict[str, tuple[dict[str, str], str]] = {
    "does-not-import": ({"one/__init__.py": BROKEN, "one/does-not-import.toml": profile("does-not-import")}, "RuntimeError: out of order"),
    "has-no-module": ({}, "No module named 'two'"),
    "has-no-file": ({"three/__init__.py": ""}, "has-no-file.toml cannot be read from 'three'"),
    "is-no-toml": ({"four/is-no-toml.toml": "name = "}, "is-no-toml.toml is not valid TOML"),
    "has-unknown-keys": ({"five/has-unknown-keys.toml": profile("has-unknown-keys") + "colour = 1\n"}, "scheme.colour: unknown key"),
    "has-another-name": ({"six/has-another-name.toml": profile("other")}, "has-another-name.toml has name = 'other'"),
    "extends-nothing": ({"seven/extends-nothing.toml": 'extends = "int4-vlm"\n'}, "Did you mean 'int4-vllm'?"),
}
"""Name -> the files of its package, and what the error says besides the name of the distribution."""
PACKAGES = dict(zip(TARGETS, ("one", "two", "three", "four", "five", "six", "seven"), strict=True))
PARTS: dict[str, tuple[str, dict[str, str], str]] = {
    "no-such-module": ("PKG.gone:Thing", {}, "it has no module 'PKG.gone'"),
    "no-such-package": ("PKG_gone.module:Thing", {}, "No module named 'PKG_gone'"),
    "raises": ("PKG.module:Thing", {"PKG/module.py": BROKEN}, "RuntimeError: out of order"),
    "lacks-a-package": ("PKG.module:Thing", {"PKG/module.py": "import not_there\n"}, "No module named 'not_there'"),
    "is-no-python": ("PKG.module:Thing", {"PKG/module.py": "def Thing(:\n"}, "SyntaxError"),
    "no-such-class": ("PKG.module:Thing", {"PKG/module.py": ""}, "has no attribute 'Thing'"),
}
"""Case -> entry point, files and reason; PKG is the package, another one in each test."""


def row(output: str, name: str) -> str:
    """The row of a table that starts with `name`, its folded lines joined."""
    lines = output.splitlines()
    (start,) = (index for index, line in enumerate(lines) if line.split()[:1] == [name])
    end = next((index for index in range(start + 1, len(lines)) if lines[index][:1] not in (" ", "")), len(lines))
    return " ".join(" ".join(lines[start:end]).split())


@pytest.fixture
def broken_targets(tmp_path: Path) -> Path:
    for name, (files, _) in TARGETS.items():
        lay_out(tmp_path / "site", f"{name}-dist", files, profiles=f"{name} = {PACKAGES[name]}")
    return tmp_path / "site"


@pytest.mark.parametrize("command", ["list", "check"])
def test_broken_targets_are_listed_with_their_reasons_beside_the_others(command: str, broken_targets: Path, tmp_path: Path) -> None:
    shown = hetero_rl("targets", command, cwd=tmp_path, PYTHONPATH=python_path(broken_targets))
    assert shown.returncode == 0, shown.stderr
    for name, (_, reason) in TARGETS.items():
        assert f"package '{name}-dist'" in row(shown.stdout, name)
        assert reason in row(shown.stdout, name)
    assert "dist" not in row(shown.stdout, "fake")


def test_a_broken_target_is_refused_where_it_is_asked_for(broken_targets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(broken_targets))
    for name, (_, reason) in TARGETS.items():
        with pytest.raises(PlugInError) as caught:
            load_profile(name)
        assert isinstance(caught.value, ProfileError)
        for fragment in (repr(name), f"'{name}-dist'", reason):
            assert fragment in str(caught.value)
    assert load_profile("fake").name == "fake"
    path = python_path(broken_targets)
    for arguments in (("targets", "check", "does-not-import"), ("train", "--target", "does-not-import")):
        fails(hetero_rl(*arguments, cwd=tmp_path, PYTHONPATH=path), 2, "'does-not-import-dist'", "RuntimeError: out of order")


def test_a_name_that_two_packages_want_is_nobodys(tmp_path: Path) -> None:
    sites = [
        lay_out(tmp_path / package, package, {f"{package}_pkg/mine.toml": profile("mine")}, profiles=f"mine = {package}_pkg")
        for package in ("first", "second")
    ]
    both, one = python_path(*sites), python_path(sites[0])
    for arguments in (("targets", "check", "mine"), ("targets", "show", "mine"), ("train", "--target", "mine")):
        fails(hetero_rl(*arguments, cwd=tmp_path, PYTHONPATH=both), 2, "'mine' cannot be used", "taken twice", "'first', 'second'")
    assert "taken twice" in row(hetero_rl("targets", "list", cwd=tmp_path, PYTHONPATH=both).stdout, "mine")
    assert hetero_rl("targets", "check", "mine", cwd=tmp_path, PYTHONPATH=one).returncode == 0


def test_a_shipped_target_is_never_replaced_in_silence(tmp_path: Path) -> None:
    path = python_path(lay_out(tmp_path / "site", "greedy", {"pkg/int4-onnx.toml": profile("int4-onnx")}, profiles="int4-onnx = pkg"))
    for arguments in (("targets", "check", "int4-onnx"), ("train", "--target", "int4-onnx")):
        fails(hetero_rl(*arguments, cwd=tmp_path, PYTHONPATH=path), 2, "'int4-onnx' cannot be used", "shipped with hetero-rl", "'greedy'")
    assert hetero_rl("targets", "check", "fake", cwd=tmp_path, PYTHONPATH=path).returncode == 0


@pytest.mark.parametrize(("kind", "name"), [("engine", "fake"), ("quantizer", "none")])
def test_a_shipped_part_is_never_replaced_in_silence(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, "greedy", {}, **{f"{kind}s": f"{name} = pkg.module:Thing"})
    monkeypatch.syspath_prepend(str(tmp_path))
    (reason,) = check_target(load_profile("fake"))
    for fragment in (f"the {kind} {name!r} cannot be used", "shipped with hetero-rl", "'greedy'"):
        assert fragment in reason


@pytest.mark.parametrize("kind", ["engine", "quantizer"])
@pytest.mark.parametrize("case", PARTS)
def test_a_part_that_does_not_load_is_named_before_anything_starts(
    kind: str, case: str, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"{kind}_{case.replace('-', '_')}"
    value, reason = (text.replace("PKG", package) for text in PARTS[case][::2])
    files = {name.replace("PKG", package): text for name, text in PARTS[case][1].items()}
    lay_out(tmp_path, "parts-dist", {f"{package}/__init__.py": "", **files}, **{f"{kind}s": f"mine = {value}"})
    monkeypatch.syspath_prepend(str(tmp_path))
    target = parse_profile(profile("mine", **{kind: "mine"}), "mine.toml")
    with pytest.raises(PreflightError) as caught:
        preflight(target, tiny_models("qwen3"))
    assert any("'parts-dist'" in line and reason in line for line in caught.value.offenders), caught.value.offenders
    with pytest.raises(PlugInError, match="'parts-dist'"):
        resolve(kind, "mine", "")  # type: ignore[arg-type]
    assert check_target(load_profile("bf16-transformers")) == []


def test_train_refuses_an_engine_that_does_not_import_before_it_makes_a_folder(tmp_path: Path) -> None:
    files = {"pkg/module.py": BROKEN, "pkg/mine.toml": profile("mine", engine="mine")}
    site = lay_out(tmp_path / "site", "parts-dist", files, profiles="mine = pkg", engines="mine = pkg.module:Thing")
    result = hetero_rl("train", "--target", "mine", "--run-dir", "run", cwd=tmp_path, PYTHONPATH=python_path(site))
    fails(result, 2, "'parts-dist'", "RuntimeError: out of order")
    assert not (tmp_path / "run").exists()


def test_an_engine_that_does_not_import_in_a_process_of_its_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, "parts-dist", {"own_pkg/module.py": BROKEN}, engines="mine = own_pkg.module:Thing")
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    with pytest.raises(PlugInError, match="'parts-dist'") as caught:
        open_engine(parse_profile(profile("mine", engine="mine", process="own"), "mine.toml"), tmp_path, 0)
    assert "RuntimeError: out of order" in caught.value.offenders[0]
