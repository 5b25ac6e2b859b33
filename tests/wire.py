"""A network that can be cut, between a client and a port of this machine."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Wire:
    """A way to a port that breaks when it is told to, or in the middle of what is sent."""

    def __init__(self, port: int) -> None:
        self._to, self._ends = port, list[socket.socket]()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.bytes_left: int | None = None
        """So many more pass to the port, and the connections break; None: no end."""
        self.num_breaks = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, far = self._server.accept()[0], socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                threading.Thread(target=self._carry, args=(near, far), kwargs={"is_counted": True}, daemon=True).start()
                threading.Thread(target=self._carry, args=(far, near), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, *, is_counted: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 12):
                if is_counted and self.bytes_left is not None:
                    data, self.bytes_left = data[: self.bytes_left], max(0, self.bytes_left - len(data))
                    sink.sendall(data)
                    if self.bytes_left == 0:
                        self.num_breaks += 1
                        _close(source, sink)
                        return
                else:
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Nothing passes any more, in the middle of what did."""
        _close(self._server, *self._ends)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cut()


def _close(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes who waits on it; a mere close would not
        end.close()
