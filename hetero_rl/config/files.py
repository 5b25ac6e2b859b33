"""From TOML files and `--set` to a config: recipe below profile below files below settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from deploy_targets.errors import ProfileError, UsageError
from deploy_targets.profile import TargetProfile, load_profile, validation_lines
from hetero_rl.config.run import RunConfig, TargetConfig
from hetero_rl.recipe import recipe_settings
from hetero_rl.tasks.config import ArithmeticConfig, DatasetConfig


def load_config(
    files: Sequence[Path], settings: Sequence[str] = (), target: str | None = None, base: RunConfig | None = None
) -> tuple[RunConfig, TargetProfile]:
    """Merge the recipe, the profile's recommended `[constraint]`, TOML `files` and `settings` (`a.b=c`); later ones win.

    Args:
        files: TOML files; none gives the defaults, which are the demo.
        settings: `table.key=value`; the value is read as TOML, and as a plain string where it is not TOML.
        target: What --target said; wins over `[target] name`.
        base: A config that everything else is laid over (a resumed run's own); None is the defaults.

    Raises:
        UsageError: a file that is missing or unreadable, or a setting without `=`.
        ProfileError: every unknown key and every value of a wrong type or range, at once.
        UnknownNameError: the target does not exist.
    """
    merged: dict[str, Any] = {} if base is None else base.model_dump(mode="json")
    for file in files:
        _merge(merged, _read_toml(file))
    for setting in settings:
        _merge(merged, _parse_setting(setting))
    if target is not None:
        _merge(merged, {"target": {"name": target}})
    name = _dig(merged, "target", "name", default=TargetConfig().name)
    profile = load_profile(name if isinstance(name, str) else str(name))
    with_profile = recipe_settings(merged.get("recipe", "auto"), profile, merged)
    _merge(with_profile, {"constraint": dict(profile.constraint)})
    _merge(with_profile, merged)
    try:
        return RunConfig.model_validate(with_profile), profile
    except ValidationError as error:
        source = ", ".join(str(file) for file in files) or "the settings"
        raise ProfileError(f"the config ({source}) is not valid", validation_lines(error), _known_keys_hint(error)) from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"config file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {file} is not valid TOML: {error}") from None


def _parse_setting(setting: str) -> dict[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {setting!r} is not of the form table.key=value, e.g. --set loop.num_steps=50")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    nested: Any = value
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(into: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            # A table with another `type` is another table: keys of the old type would be unknown to it.
            if "type" in value and value["type"] != into[key].get("type"):
                into[key] = dict(value)
            else:
                _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _dig(tree: Mapping[str, Any], *keys: str, default: Any) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _known_keys_hint(error: ValidationError) -> str:
    """The keys there are, for the first table that was given an unknown one."""
    tables: dict[str, type[BaseModel]] = {"arithmetic": ArithmeticConfig, "dataset": DatasetConfig}
    tables |= {name: field.annotation for name, field in RunConfig.model_fields.items() if isinstance(field.annotation, type)}
    for item in error.errors():
        if item["type"] == "extra_forbidden":
            table = str(item["loc"][-2]) if len(item["loc"]) > 1 else ""
            known = tables[table].model_fields if table in tables else RunConfig.model_fields
            return f"Known keys of {table or 'the top level'}: {', '.join(known)}"
    return ""
