"""Writes the generated parts of the docs: metrics.md, config.md, and the tables of targets.md and algorithm.md between their markers.

python scripts/make_docs.py            write them
python scripts/make_docs.py --check    exit 1 when they are out of date
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel

import deploy_targets.profile
import hetero_rl.config
import hetero_rl.tasks.config
from deploy_targets.profile import TargetProfile, load_profile
from hetero_rl.algorithm import advantage, corrections, discrepancy, losses
from hetero_rl.config import EngineEntry, RunConfig
from hetero_rl.metrics import glossary
from hetero_rl.tasks.config import ArithmeticConfig, DatasetConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def main() -> int:
    pages = {
        "metrics.md": metrics_reference(),
        "config.md": config_reference(),
        "targets.md": page_with("targets.md", targets=shipped_targets(), profile=profile_reference()),
        "algorithm.md": page_with("algorithm.md", estimators=estimators()),
    }
    stale = [name for name, text in pages.items() if not (DOCS / name).is_file() or (DOCS / name).read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"docs/{name} is out of date: run scripts/make_docs.py" for name in stale) or "docs are up to date")
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(pages[name], "utf-8")
    return 0


def metrics_reference() -> str:
    return (
        "# Metrics\n\nOne JSON object a step in `metrics.jsonl`, the same in TensorBoard. Made from `hetero_rl/metrics.py` by "
        "`scripts/make_docs.py`.\n\n" + glossary()
    )


def config_reference() -> str:
    """Markdown: one table per config table, with default and meaning of every key."""
    docs = _field_docs(hetero_rl.config) | _field_docs(hetero_rl.tasks.config)
    lines = [
        "# Settings",
        "",
        "TOML files given with `--config` (later ones win), then `--set table.key=value`. Unknown keys are errors. Made from "
        "`hetero_rl/config.py` by `scripts/make_docs.py`.",
    ]
    tables: list[tuple[str, type[BaseModel]]] = []
    for name, field in RunConfig.model_fields.items():
        if name == "task":
            tables += [('task, type = "arithmetic"', ArithmeticConfig), ('task, type = "dataset"', DatasetConfig)]
        elif name == "engines":
            tables.append(("[engines]", EngineEntry))
        elif isinstance(field.annotation, type):
            tables.append((name, field.annotation))
    values = [
        key for key, field in RunConfig.model_fields.items() if key not in ("task", "engines") and not isinstance(field.annotation, type)
    ]
    lines += ["", "## Top level", "", *_table_of(RunConfig, docs, values)]
    for title, model in tables:
        lines += ["", f"## [{title}]", "", *_table_of(model, docs)]
    return "\n".join(lines) + "\n"


def page_with(name: str, **parts: list[str]) -> str:
    """docs/NAME with the lines between the markers of each of `parts` made anew."""
    page = (DOCS / name).read_text("utf-8")
    for part, lines in parts.items():
        begin, end = f"<!-- {part}: made by scripts/make_docs.py -->\n", f"<!-- end of {part} -->\n"
        before, found, rest = page.partition(begin)
        _, also_found, after = rest.partition(end)
        if not (found and also_found):
            raise SystemExit(f"docs/{name} has lost the markers of {part!r}; put them back")
        page = before + begin + "\n".join(["", *lines, "", end]) + after
    return page


def estimators() -> list[str]:
    """The table of each piece of the method: that of its module's docstring."""
    lines: list[str] = []
    for module in (discrepancy, advantage, losses, corrections):
        name = module.__name__.rpartition(".")[2]
        table = [line.replace("||", "‖") for line in inspect.getdoc(module).splitlines() if line.startswith("|")]
        lines += ["", f"### [{name}.py](../hetero_rl/algorithm/{name}.py)", "", *table]
    return lines[1:]


def shipped_targets() -> list[str]:
    """One row for each file of deploy_targets/profiles; the plug-ins of this machine are left out."""
    lines = ["| target | scheme | engine | publish | what it is |", "| --- | --- | --- | --- | --- |"]
    for file in sorted((ROOT / "deploy_targets" / "profiles").glob("*.toml"), key=lambda file: file.stem):
        target = load_profile(file.stem)
        lines.append(f"| `{target.name}` | {target.scheme.name} | {target.engine.name} | {target.engine.publish} | {target.description} |")
    return lines


def profile_reference() -> list[str]:
    """One table for each table of a profile."""
    docs = _field_docs(deploy_targets.profile)
    lines = ["### Top level", "", *_table_of(TargetProfile, docs)]
    for name, field in TargetProfile.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += ["", f"### [{name}]", "", *_table_of(field.annotation, docs)]
    return lines


def _table_of(model: type[BaseModel], docs: dict[tuple[str, str], str], keys: Sequence[str] | None = None) -> list[str]:
    lines = ["| key | default | what it is |", "| --- | --- | --- |"]
    for key in model.model_fields if keys is None else keys:
        field = model.model_fields[key]
        default = field.get_default(call_default_factory=True)
        shown = f"`{_plain(default)}`"
        if field.is_required():
            shown = "required"
        elif isinstance(default, BaseModel):
            shown = "see its table"
        elif default in ("", (), {}):
            shown = "empty"
        lines.append(f"| `{key}` | {shown} | {_doc(docs, model, key)} |")
    return lines


def _plain(value: object) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _doc(docs: dict[tuple[str, str], str], model: type[BaseModel], key: str) -> str:
    for base in model.__mro__:
        if (base.__name__, key) in docs:
            return docs[base.__name__, key].replace("|", "\\|")
    raise AssertionError(f"{model.__name__}.{key} has no docstring")


def _field_docs(module: ModuleType) -> dict[tuple[str, str], str]:
    docs: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, doc in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                docs[node.name, field.target.id] = " ".join(str(doc.value.value).split())
    return docs


if __name__ == "__main__":
    raise SystemExit(main())
