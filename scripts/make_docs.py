"""Writes the generated parts of the docs: metrics.md, config.md, and the tables of targets.md, algorithm.md, blame.md between markers.

python scripts/make_docs.py            write them
python scripts/make_docs.py --check    exit 1 when they are out of date
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

import deploy_targets.profile
import hetero_rl.config.learning
import hetero_rl.config.run
import hetero_rl.config.serving
import hetero_rl.tasks.config
from deploy_targets.profile import TargetProfile, load_profile
from hetero_rl.algorithm import advantage, corrections, discrepancy, losses
from hetero_rl.config import EngineEntry, RunConfig
from hetero_rl.metrics import glossary
from hetero_rl.tasks.config import ArithmeticConfig, DatasetConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CAUGHT = ROOT / "benchmarks" / "results" / "faults_caught.jsonl"
"""One line for each verdict of scripts/test_faults_caught.sh."""
FAULTS = {
    "test_a_flipped_byte_is_no_longer_what_was_exported": "one weight byte flipped",
    "flip_byte": "the same, every hash made to fit",
    "swap_scales": "scales of two layers swapped",
    "drop_bias": "a bias set to zero",
    "remove_bias": "a bias left out",
    "test_older_weights_are_named": "weights of one version earlier",
    "wrong_group_size": "wrong group size",
    "IgnoresTemperature": "temperature ignored",
    "TopP": "top-p renormalised log-probs, of samples",
    "TopPEverywhere": "the same, of scores",
    "other_chat_template": "chat template changed",
    "swap_token_ids": "two ids of the tokenizer swapped",
    "other_eos": "EOS id changed",
    "test_a_kv_scale_of_zero": "KV cache scale zero",
    "test_a_quantized_head": "output head quantized though the scheme says not",
    "untie": "tied embedding broken",
    "other_rope_theta": "rope theta changed",
    "nan_in_expert": "NaN in one expert",
    "OtherToken": "log-probs of the wrong token",
    "test_a_length_limit_below_the_probes_is_named": "length limit shorter than the probes",
    "StalePrefix": "prefix cache with stale weights",
}
"""Name of the fault, or of the test with one of its own -> what it is."""
ENGINES = {"onnx": "ONNX Runtime", "vllm": "vLLM", "llamacpp": "llama.cpp", "transformers": "transformers"}


def main() -> int:
    pages = {
        "metrics.md": metrics_reference(),
        "config.md": config_reference(),
        "targets.md": page_with("targets.md", targets=shipped_targets(), profile=profile_reference()),
        "algorithm.md": page_with("algorithm.md", estimators=estimators()),
        "blame.md": page_with("blame.md", faults=caught_faults()),
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
    modules = (hetero_rl.config.run, hetero_rl.config.learning, hetero_rl.config.serving, hetero_rl.tasks.config)
    docs = {key: text for module in modules for key, text in _field_docs(module).items()}
    lines = [
        "# Settings",
        "",
        "TOML files given with `--config` (later ones win), then `--set table.key=value`. Unknown keys are errors. Made from "
        "`hetero_rl/config/` by `scripts/make_docs.py`.",
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


def caught_faults() -> list[str]:
    """What the tests of every injected fault saw: the gates that failed on each engine, and what the report named."""
    rows = [json.loads(line) for line in CAUGHT.read_text("utf-8").splitlines()]
    found = {
        name: [row for row in rows if row["given"].get("fault", row["test"]) == name and "bisect" not in row["test"]] for name in FAULTS
    }
    injected = [row for some in found.values() for row in some]
    num_passed = sum(row["exit_code"] == 0 for row in injected)
    num_targets = len({row["target"] for row in injected})
    lines = [
        f"{len(injected)} faults injected on {num_targets} targets; {num_passed} passed.",
        "",
        f"| fault | {' | '.join(ENGINES.values())} | named, for example |",
        f"| --- |{' --- |' * len(ENGINES)} --- |",
    ]
    for name, title in FAULTS.items():
        cells = [_gates([row for row in found[name] if engine in row["target"]]) for engine in ENGINES]
        example = found[name][0]["cause"].partition(" (")[0].split(";")[0] if found[name] else ""
        lines.append(f"| {title} | {' | '.join(cells)} | {_shortened(example)} |")
    return lines


def _gates(rows: list[dict[str, Any]]) -> str:
    """Gates that failed on every target of an engine; `refused` where none was judged, since the engine was not started."""
    if not rows:
        return ""
    if any(row["verdict"] == "error" for row in rows):
        return "refused"
    return ", ".join(f"`{gate}`" for gate in rows[0]["failed"] if all(gate in row["failed"] for row in rows))


def _shortened(text: str) -> str:
    words = [f"{word[:8]}..." if len(word) == 64 else word for word in text.replace("|", "\\|").split()]
    return " ".join(words)


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
