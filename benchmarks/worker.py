"""A side of a comparison in a process of its own, asked for one step at a time so that only one side works."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

CLOSE_TIMEOUT_S = 30.0
Body = Callable[..., None]
"""`body(connection, *arguments)`: builds its side, then serves requests, most simply by `serve`."""


class Worker:
    """A fresh interpreter that runs `body`; calling the worker sends one request and waits for its answer."""

    def __init__(self, body: Body, *arguments: Any, environ: Mapping[str, str] | None = None) -> None:
        """Start `body` under `environ` (this process's own by default); it gets ready while the caller goes on."""
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(body, theirs, arguments), daemon=True)
        with _environment(environ):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        """Wait until the side is ready."""
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the process."""
        self.close()

    def __call__(self, *request: Any) -> Any:
        """One request, one answer. Raises `RuntimeError` with the side's traceback."""
        self._connection.send(request)
        return self._answer()

    def close(self) -> None:
        """Let the side end by itself; kill it when it does not."""
        self._connection.close()
        self._process.join(CLOSE_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            ok, answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("the worker ended without an answer; its last words are above") from None
        if not ok:
            raise RuntimeError(f"the worker failed:\n{answer}")
        return answer


def serve(connection: Connection, step: Callable[..., Any]) -> None:
    """Say that the side is ready, then answer requests with `step(*request)` until the other end is closed."""
    connection.send((True, None))
    for request in requests(connection):
        connection.send((True, step(*request)))


def requests(connection: Connection) -> Iterator[tuple[Any, ...]]:
    """The requests as they come."""
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


def _run(body: Body, connection: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        body(connection, *arguments)
    except BaseException:
        connection.send((False, traceback.format_exc()))
        raise


@contextmanager
def _environment(environ: Mapping[str, str] | None) -> Iterator[None]:
    saved = dict(os.environ)
    if environ is not None:
        os.environ.clear()
        os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
