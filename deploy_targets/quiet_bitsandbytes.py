"""bitsandbytes, imported without the log lines that say nothing to a user of a target."""

from __future__ import annotations

import logging
from typing import Any

_TALKATIVE = (
    "bitsandbytes.backends.cpu.ops",  # at import: a kernel of the package `kernels` is missing; the targets do not use it
    "bitsandbytes.autograd._functions",  # at every LLM.int8() layer of every forward pass: its bf16 inputs are cast to float16
)


def bitsandbytes() -> Any:
    """The package, imported now. Raises `ModuleNotFoundError` where it is not installed."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    import bitsandbytes as package

    return package


def functional() -> Any:
    """The module `bitsandbytes.functional`."""
    return bitsandbytes().functional
