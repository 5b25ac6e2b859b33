"""Whether this machine can do what `learner.offload` asks for."""

from __future__ import annotations

import contextlib
import io
import os

from hetero_rl.config import LearnerConfig


def offload_problems(config: LearnerConfig) -> list[str]:
    """Why DeepSpeed cannot keep its state on the disk of `learner.nvme_path`, one line each; nothing to say of other places."""
    if config.nvme_path is None:
        return []
    problems = []
    if not config.nvme_path.is_dir() or not os.access(config.nvme_path, os.W_OK):
        problems.append(f"learner.nvme_path = {str(config.nvme_path)!r} is no folder that can be written")
    with contextlib.redirect_stdout(io.StringIO()):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        can_be_built = AsyncIOBuilder().is_compatible(verbose=False)
    if not can_be_built:
        problems.append("learner.offload = 'nvme' needs libaio to compile DeepSpeed's async_io: install libaio-dev (libaio-devel)")
    return problems
