"""Ports of the loopback for servers that are started a while after they were given one."""

from __future__ import annotations

import random
import socket

_BELOW_THE_EPHEMERAL = range(10_240, 32_000)
"""Where the system gives none by itself: one that was free a moment ago is free still."""


def free_port() -> int:
    while True:
        port = random.choice(_BELOW_THE_EPHEMERAL)
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return port
        except OSError:
            continue
