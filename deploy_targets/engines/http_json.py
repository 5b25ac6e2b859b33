"""JSON over HTTP to one server, by the standard library: a hard deadline for every request, few retries, no redirects, no proxies."""

from __future__ import annotations

import copy
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy_targets.errors import EngineError, UsageError

API_KEY_VARIABLE = "HETERO_RL_API_KEY"
"""Environment variable that holds the key of the server."""
_NUM_ATTEMPTS = 3
_PAUSE_S = 0.5
_RETRIED = (429, 502, 503, 504)
"""Busy, or restarting behind a proxy. An answer 500 comes again: it is not asked for."""
_MAX_ANSWER_BYTES = 1 << 30
_TEXT_CHARS = 300


class StatusError(EngineError):
    """The server answered, and with a status that is an error."""


class NotFoundError(StatusError):
    """The server has no such path (404)."""


class JsonServer:
    """One server at `url`, and the connection to it, which is kept open between requests."""

    def __init__(
        self, url: str, api_key: str | None, timeout_s: float, *, key_name: str = API_KEY_VARIABLE, ca_file: Path | None = None
    ) -> None:
        """Nothing is asked yet. `timeout_s` bounds each request, retries and all; `key_name` says where the key was given.

        Raises `UsageError` for a URL, key or certificate that is none.
        """
        try:
            parts = urlsplit(url)
            wrong = parts.scheme not in ("http", "https") or not parts.hostname or bool(parts.query or parts.fragment or parts.username)
            self._address = (parts.hostname or "", parts.port)
        except ValueError:  # a port that is no number, brackets that do not close
            wrong = True
        if wrong:
            raise UsageError(f"{url!r} is no address of a server; give http://HOST:PORT, and the key, where it wants one, in {key_name}")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError(f"the key in {key_name} holds characters that no HTTP header can; give it without line breaks")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._prefix = urlsplit(self.url).path
        try:
            self._tls = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        except OSError as error:
            raise UsageError(f"the certificate {ca_file} for {url} cannot be read: {error.strerror or error}") from None
        self._key_name = key_name
        self._headers = {"Accept": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    @property
    def is_local(self) -> bool:
        """Whether the address is this machine's own loopback."""
        return self._address[0] in ("localhost", "::1") or self._address[0].startswith("127.")

    def another(self) -> JsonServer:
        """A second connection to the same server, to ask it several things at once."""
        other = copy.copy(self)
        other._connection = None
        return other

    def get(self, path: str) -> Any:
        """What `GET path` answers, parsed."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What `POST path` answers, parsed."""
        return self._ask("POST", path, json.dumps(body).encode())

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        """Raises `UsageError` for a key that is missing or wrong, `NotFoundError`, and `EngineError` for all else that goes wrong."""
        deadline = time.monotonic() + self._timeout_s
        what = f"{method} {path}"
        for attempt in range(1, _NUM_ATTEMPTS + 1):
            last = attempt == _NUM_ATTEMPTS or time.monotonic() + _PAUSE_S * attempt >= deadline
            try:
                status, data = self._ask_once(method, path, body, deadline)
            except ConnectionRefusedError:
                raise EngineError(f"no server answers at {self.url}: connection refused. Start it, or correct the address") from None
            except socket.gaierror as error:
                raise EngineError(f"the host of {self.url} is not known: {error.strerror}") from None
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() >= deadline:
                    raise EngineError(f"the server at {self.url} did not answer {what} within {self._timeout_s:g} s") from None
                # A server closes connections that were idle, and sometimes just when they are used again.
                if last:
                    raise EngineError(f"the connection to {self.url} broke during {what}: {type(error).__name__}: {error}") from None
            else:
                if status == 200:
                    return self._parsed(what, data)
                if status not in _RETRIED or last:
                    raise self._refusal(what, status, data)
            time.sleep(_PAUSE_S * attempt)
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, method: str, path: str, body: bytes | None, deadline: float) -> tuple[int, bytes]:
        """Status and body of one answer; the connection is closed unless all went well. Raises `OSError`, `HTTPException`."""
        left = max(deadline - time.monotonic(), 0.001)
        if self._connection is None:
            self._connection = (
                http.client.HTTPConnection(*self._address, timeout=left)
                if self._tls is None
                else http.client.HTTPSConnection(*self._address, timeout=left, context=self._tls)
            )
        connection = self._connection
        whole = False
        try:
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(left)
            # The timeout of a socket starts anew with every byte; a watchdog ends an answer that trickles.
            watchdog = threading.Timer(left, _shut, [connection.sock])
            watchdog.daemon = True
            watchdog.start()
            try:
                headers = {**self._headers, **({"Content-Type": "application/json"} if body is not None else {})}
                connection.request(method, self._prefix + path, body, headers)
                response = connection.getresponse()
                length = response.length
                data = response.read(_MAX_ANSWER_BYTES + 1)
            finally:
                watchdog.cancel()
            if time.monotonic() >= deadline:
                raise TimeoutError
            if len(data) > _MAX_ANSWER_BYTES:
                raise EngineError(f"the server at {self.url} answered {method} {path} with more than {_MAX_ANSWER_BYTES} bytes")
            if length is not None and len(data) < length:
                raise http.client.IncompleteRead(data, length - len(data))
            whole = True
            return response.status, data
        finally:
            if not whole:
                self.close()

    def _parsed(self, what: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise EngineError(f"the server at {self.url} answered {what} with something that is not JSON: {_excerpt(data)}") from None

    def _refusal(self, what: str, status: int, data: bytes) -> Exception:
        if status in (401, 403):
            has_key = "Authorization" in self._headers
            reason = f"it does not accept the key in {self._key_name}" if has_key else f"it wants a key: set {self._key_name} to it"
            return UsageError(f"the server at {self.url} refuses {what} ({status}): {reason}")
        error = NotFoundError if status == 404 else StatusError
        return error(f"the server at {self.url} answered {what} with status {status}: {_excerpt(data)}")


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _excerpt(data: bytes) -> str:
    """The message in an answer of either server, else its beginning; printable, one line."""
    with suppress(ValueError, RecursionError, TypeError, KeyError):
        found = json.loads(data)
        found = found.get("error", found) if isinstance(found, dict) else found
        data = str(found["message"] if isinstance(found, dict) else found).encode()
    text = " ".join(data[: 4 * _TEXT_CHARS].decode("utf-8", "replace").split())
    return "".join(c if c.isprintable() else "?" for c in text)[:_TEXT_CHARS] or "(nothing)"
