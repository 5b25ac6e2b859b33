"""Writes the generated parts of the docs: docs/metrics.md (from `hetero_rl.metrics`) and docs/config.md (from `hetero_rl.config`).

python scripts/make_docs.py            write them
python scripts/make_docs.py --check    exit 1 when they are out of date
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel

import hetero_rl.config
import hetero_rl.tasks.config
from hetero_rl.config import RunConfig
from hetero_rl.metrics import glossary
from hetero_rl.tasks.config import ArithmeticConfig, DatasetConfig

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> int:
    pages = {"metrics.md": metrics_reference(), "config.md": config_reference()}
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
        else:
            assert isinstance(field.annotation, type)
            tables.append((name, field.annotation))
    for title, model in tables:
        lines += ["", f"## [{title}]", "", "| key | default | what it is |", "| --- | --- | --- |"]
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else f"`{_plain(field.default)}`"
            lines.append(f"| `{key}` | {default} | {_doc(docs, model, key)} |")
    return "\n".join(lines) + "\n"


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
