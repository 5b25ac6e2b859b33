"""An engine on another machine, behind its target agent (docs/target-agent.md): weights travel as differences, tokens as JSON."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx

from deploy_targets.deltas import BLOCK_BYTES, packed
from deploy_targets.engines.outbox import Outbox
from deploy_targets.engines.wire import generate_request, score_request, unpack_error, unpack_generations, unpack_scores
from deploy_targets.errors import DeployTargetsError, EngineError, UsageError
from deploy_targets.profile import TargetProfile
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile
from deploy_targets.weights_file import WEIGHTS_FILES

CONNECT_TIMEOUT_S = 20.0

Answer = TypeVar("Answer", Generation, TokenScores)


class RemoteEngine:
    """The engine protocol over HTTP. `bytes_sent` counts what was sent of weights: whole files, and differences."""

    def __init__(
        self,
        profile: TargetProfile,
        artifact_dir: Path,
        weight_version: int,
        *,
        url: str,
        token: str,
        ca_file: Path | None = None,
        call_timeout_s: float = 3600.0,
        outbox: Outbox | None = None,
    ) -> None:
        """Send the folder, as far as the agent lacks it, and have its engine started.

        `call_timeout_s`: longest silence of the agent, in any call. `outbox`: shared with the other agents of a pool. Raises `UsageError`
        for an address, certificate or token that is none, and `EngineError` for an agent that cannot be reached, serves another target
        or cannot start its engine.
        """
        self.url, self.weight_version = url.rstrip("/"), weight_version
        self.bytes_sent = {"whole": 0, "delta": 0}
        self._lock = threading.Lock()
        self._client = _client(self.url, token, ca_file, call_timeout_s)
        self._outbox = outbox or Outbox()
        self._lease: str | None = None
        try:
            self._lease = self._start(profile, Path(artifact_dir))
        except BaseException:
            self.close()
            raise

    def update(self, weights: WeightFile) -> int:
        """Send what changed since a version that the agent holds, or all of it where that is not less, and have it served."""
        sha256 = self._bring(weights.path)
        answer = self._post("update", {"sha256": sha256, "weight_version": weights.weight_version})
        self.weight_version = int(answer["weight_version"])
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Have the agent's engine sample."""
        answer = self._post("generate", generate_request(prompts, sampling), is_repeatable=True)
        return self._understood(lambda: unpack_generations(answer, prompts))

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Have the agent's engine score."""
        answer = self._post("score", score_request(sequences, temperature), is_repeatable=True)
        return self._understood(lambda: unpack_scores(answer))

    def close(self) -> None:
        """Let go of the connection; the agent keeps its engine, and what it holds need not be sent again."""
        self._client.close()

    def _start(self, profile: TargetProfile, artifact_dir: Path) -> str:
        paths = {path.relative_to(artifact_dir).as_posix(): path for path in sorted(artifact_dir.rglob("*")) if path.is_file()}
        # Beside the weights of now lie, while they are published, those of the next version.
        paths = {name: path for name, path in paths.items() if not name.endswith((".next", ".proven", ".partial"))}
        files: dict[str, str] = {}
        for name, path in paths.items():
            files[name] = self._bring(path, is_replaced=name in WEIGHTS_FILES)
        asked = {"files": files, "weight_version": self.weight_version, "scheme": profile.scheme.model_dump(mode="json")}
        return str(self._ask("POST", "/v1/start", json=asked)["lease"])

    def _bring(self, path: Path, *, is_replaced: bool = True) -> str:
        """Send a file; one that `is_replaced` may be, by the next version under its name, is held until then. Returns its sha256."""
        try:
            sha256, held = self._outbox.hold(path) if is_replaced else (self._outbox.sha256(path), path)
            self._send(sha256, held)
        except OSError as error:
            raise EngineError(f"what goes to {self.url} cannot be kept in {self._outbox.folder}: {error.strerror or error}") from error
        return sha256

    def _send(self, sha256: str, path: Path) -> None:
        """Bring a file to the agent, if it does not hold it."""
        if self._holds(sha256):
            return
        base = next(filter(self._holds, self._outbox.bases(sha256)), None)
        delta = None if base is None else self._outbox.difference(path, sha256, base)
        if delta is None:
            self._put(sha256, "whole", lambda: packed(path, None))
        else:
            with delta:
                self._put(f"{sha256}?base={base}", "delta", lambda: iter(lambda: delta.read(BLOCK_BYTES), b""))

    def _holds(self, sha256: str) -> bool:
        return self._status("HEAD", f"/v1/files/{sha256}") == 200

    def _put(self, name: str, how: str, blocks: Callable[[], Iterator[bytes]]) -> None:
        def counted() -> Iterator[bytes]:
            for block in blocks():
                self.bytes_sent[how] += len(block)
                yield block

        self._ask("PUT", f"/v1/files/{name}", content=counted)

    def _post(self, call: str, asked: Mapping[str, Any], *, is_repeatable: bool = False) -> Any:
        return self._ask("POST", f"/v1/{call}", json={"lease": self._lease, **asked}, is_repeatable=is_repeatable)

    def _ask(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: Callable[[], Iterator[bytes]] | None = None,
        is_repeatable: bool = False,
    ) -> Any:
        """What the agent answers, parsed. Raises the error it answers with, or `EngineError`; a wrong token is a `UsageError`."""
        try:
            response = self._request(method, path, json, content, is_repeatable=is_repeatable)
            answer = response.json()
        except ValueError:
            raise EngineError(f"what answers at {self.url} is no target agent: {method} {path} gave something that is not JSON") from None
        if response.status_code == 200:
            return answer
        raise self._error(method, path, response.status_code, answer)

    def _status(self, method: str, path: str) -> int:
        status = self._request(method, path, None, None, is_repeatable=True).status_code
        if status in (401, 429):
            raise self._refused(status)
        return status

    def _request(
        self, method: str, path: str, json: Any, content: Callable[[], Iterator[bytes]] | None, *, is_repeatable: bool
    ) -> httpx.Response:
        with self._lock:
            for is_last in (False, True) if is_repeatable else (True,):
                try:
                    return self._client.request(method, path, json=json, content=None if content is None else content())
                except httpx.TimeoutException as error:
                    raise EngineError(f"the agent at {self.url} did not answer {method} {path}: {type(error).__name__}") from None
                except httpx.TransportError as error:
                    # A connection that lay idle may be gone; asked again, the same call gives the same answer.
                    if is_last:
                        raise EngineError(f"the agent at {self.url} cannot be reached ({method} {path}): {error}") from None
                except RuntimeError as error:  # the client was closed
                    raise EngineError(f"the engine at {self.url} is closed: {error}") from None
        raise AssertionError("the last attempt returns or raises")

    def _refused(self, status: int) -> DeployTargetsError:
        """A wrong token is the user's mistake; later on it is the agent that has changed, and others may serve."""
        kind = UsageError if self._lease is None else EngineError
        return kind(f"the agent at {self.url} does not accept the token ({status}); it is the one of its --token-file")

    def _error(self, method: str, path: str, status: int, answer: Any) -> DeployTargetsError:
        if status in (401, 429):
            return self._refused(status)
        try:
            told = answer["error"]
            error = unpack_error(told)
            message = f"the agent at {self.url}: {told['message']}"
        except (KeyError, TypeError):
            return EngineError(f"the agent at {self.url} answered {method} {path} with status {status}")
        if not isinstance(error, UsageError):
            return EngineError(message)
        error.args = (message,)
        return error

    def _understood(self, unpacked: Callable[[], list[Answer]]) -> list[Answer]:
        try:
            return unpacked()
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(f"the agent at {self.url} gave an answer that does not fit the question: {error}") from None


def _client(url: str, token: str, ca_file: Path | None, call_timeout_s: float) -> httpx.Client:
    """A connection that goes where `url` says and nowhere else. Raises `UsageError` for what is no such address, certificate or token."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"{url!r} is no address of a target agent: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        raise UsageError(f"{url!r} is no address of a target agent; give http://HOST:PORT or https://HOST:PORT")
    if not (token and token.isascii() and token.isprintable()):
        raise UsageError(f"the token for {url} is empty, or holds characters that no HTTP header can")
    try:
        verify: ssl.SSLContext | bool = True if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:
        raise UsageError(f"the certificate {ca_file} for {url} cannot be read: {error.strerror or error}") from None
    return httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {token}"},
        timeout=httpx.Timeout(call_timeout_s, connect=CONNECT_TIMEOUT_S),
        verify=verify,
        trust_env=False,
        follow_redirects=False,
    )
