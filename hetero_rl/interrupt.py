"""Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from hetero_rl.view import View


@contextmanager
def interrupt_flag(view: View) -> Iterator[list[bool]]:
    """A list that becomes non-empty on the first Ctrl-C; the second one stops at once."""
    flag: list[bool] = []

    def on_interrupt(signum: int, frame: object) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)
        view.warn("interrupted: finishing this step and saving a checkpoint; press Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
