"""bitsandbytes, imported without the log lines that say nothing to a user of a target."""

from __future__ import annotations

import logging

for _name in (
    "bitsandbytes.backends.cpu.ops",  # at import: a kernel of the package `kernels` is missing; the targets do not use it
    "bitsandbytes.autograd._functions",  # at every LLM.int8() layer of every forward pass: its bf16 inputs are cast to float16
):
    logging.getLogger(_name).setLevel(logging.ERROR)

import bitsandbytes  # noqa: E402 - the levels come first

__all__ = ["bitsandbytes"]
