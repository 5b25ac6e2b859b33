"""What `targets check` prints is the whole reason."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from deploy_targets.profile import profile_text
from hetero_rl.doctor import check_table


def test_the_extra_to_install_is_not_taken_for_markup(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    changes = {'name = "int4-onnx"': 'name = "mine"', 'packages = ["onnxruntime"]': 'packages = ["no_such_runtime"]'}
    text = profile_text("int4-onnx")
    for old, new in changes.items():
        text = text.replace(old, new)
    mine.write_text(text)
    table, runnable = check_table(str(mine))
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert not runnable
    assert "pip install 'hetero-rl[onnx]'" in console.file.getvalue()  # type: ignore[attr-defined]
