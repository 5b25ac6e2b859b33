"""The agent's HTTP: who may ask, how much, and what is answered. What it does is in host.py.

    HEAD /v1/files/SHA256            whether the agent holds a file
    PUT  /v1/files/SHA256[?base=]    a file, compressed (deltas.py), or its difference to one that it holds
    POST /v1/start                   {files: name -> sha256, weight_version, scheme} -> {lease}
    POST /v1/update                  {lease, sha256, weight_version} -> {weight_version}
    POST /v1/generate, /v1/score     {lease, ...} as in engines/wire.py
    GET  /health                     needs no token
    GET  /metrics                    Prometheus' text

A body that is cut off leaves everything as it was; what is served changes in `start` and `update` alone.
"""

from __future__ import annotations

import errno
import hmac
import json
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, BinaryIO, cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy_targets.agent.host import Conflict, Host, UnknownFile
from deploy_targets.engines.wire import pack_error
from deploy_targets.errors import DeployTargetsError, EngineError, UsageError, WeightsError

MAX_JSON_BYTES = 64 << 20
NUM_WRONG_TOKENS, WRONG_TOKENS_S = 10, 60.0
"""So many wrong tokens from one address within so many seconds, and it is not let in until the oldest of them is that old."""
NUM_ADDRESSES = 10_000
"""That have sent wrong tokens and are remembered, the last ones."""
_SPOOLED_BYTES = 16 << 20

Json = Mapping[str, Any]


class TooLong(EngineError):
    """A body beyond the limit (413)."""


class Counters:
    """What /metrics shows."""

    def __init__(self, host: Host) -> None:
        """Counters start at 0 with the process."""
        self.registry = CollectorRegistry()
        self.received = Counter("hetero_rl_agent_received_bytes", "Bytes of files received", ["how"], registry=self.registry)
        self.tokens = Counter("hetero_rl_agent_tokens", "Tokens", ["call"], registry=self.registry)
        self.seconds = Counter("hetero_rl_agent_seconds", "Seconds in calls of the engine", ["call"], registry=self.registry)
        self.answers = Counter("hetero_rl_agent_answers", "Answers by HTTP status", ["status"], registry=self.registry)
        version = Gauge(
            "hetero_rl_agent_weight_version", "Version of the weights that is served, -1 without an engine", registry=self.registry
        )
        version.set_function(lambda: -1 if host.weight_version is None else host.weight_version)


def make_app(host: Host, token: str, max_file_bytes: int) -> ASGIApp:
    """The service around `host`, for those who have `token`."""
    counters = Counters(host)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "target": host.profile.name, "weight_version": host.weight_version})

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(counters.registry), media_type=CONTENT_TYPE_LATEST)

    async def held(request: Request) -> Response:
        return Response(status_code=200 if host.has(request.path_params["sha256"]) else 404)

    async def receive(request: Request) -> Response:
        base, received = request.query_params.get("base"), 0
        with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES, dir=str(host.folder)) as body:
            async for chunk in request.stream():
                received += len(chunk)
                if received > max_file_bytes:
                    raise TooLong(f"a file of more than {max_file_bytes} bytes; the agent's --max-file-mib says how long one may be")
                await run_in_threadpool(body.write, chunk)
            body.seek(0)
            size = await run_in_threadpool(host.receive, request.path_params["sha256"], cast("BinaryIO", body), base)
        counters.received.labels("whole" if base is None else "delta").inc(received)
        return JSONResponse({"bytes": size})

    async def start(asked: Json) -> Json:
        return {"lease": await run_in_threadpool(host.start, asked["files"], int(asked["weight_version"]), asked["scheme"])}

    async def update(asked: Json) -> Json:
        served = await run_in_threadpool(host.update, asked["lease"], asked["sha256"], int(asked["weight_version"]))
        return {"weight_version": served}

    async def generate(asked: Json) -> Json:
        answer = await run_in_threadpool(host.generate, asked["lease"], asked)
        counters.tokens.labels("generate").inc(sum(answer["lengths"]))
        return answer

    async def score(asked: Json) -> Json:
        answer = await run_in_threadpool(host.score, asked["lease"], asked)
        counters.tokens.labels("score").inc(sum(answer["lengths"]))
        return answer

    def post(call: Callable[[Json], Awaitable[Json]]) -> Route:
        async def endpoint(request: Request) -> Response:
            asked = await _json_body(request)
            begun = time.perf_counter()
            try:
                answer = await call(asked)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, DeployTargetsError):
                    raise
                raise UsageError(f"the request is none that this agent understands: {type(error).__name__}: {error}") from None
            finally:
                counters.seconds.labels(call.__name__).inc(time.perf_counter() - begun)
            return JSONResponse(answer)

        return Route(f"/v1/{call.__name__}", endpoint, methods=["POST"])

    async def broken(request: Request, error: Exception) -> Response:
        """Its disk is full, or its folder is gone."""
        status = 507 if isinstance(error, OSError) and error.errno == errno.ENOSPC else 500
        return JSONResponse({"error": pack_error(EngineError(f"its folder {host.folder} cannot be written: {error}"))}, status)

    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": pack_error(error)}, _status(error))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(host.close)

    file = "/v1/files/{sha256}"
    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route(file, held, methods=["HEAD"]),
        Route(file, receive, methods=["PUT"]),
    ]
    routes += [post(call) for call in (start, update, generate, score)]
    app = Starlette(
        routes=routes, exception_handlers={DeployTargetsError: refused, ClientDisconnect: refused, OSError: broken}, lifespan=lifespan
    )
    return _Guarded(app, token, counters)


class _Guarded:
    """Lets those in who have the token, before a byte of their body is read, and counts what is answered."""

    def __init__(self, app: ASGIApp, token: str, counters: Counters) -> None:
        self._app, self._token, self._counters = app, token.encode(), counters
        self._wrong: dict[str, deque[float]] = {}
        """Address -> when the last wrong tokens came from it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._counters.answers.labels(str(message["status"])).inc()
            await send(message)

        app: ASGIApp = self._app
        if scope["type"] == "http" and scope["path"] != "/health":
            address = str((scope.get("client") or ("unknown",))[0])
            app = self._refusal(address, dict(scope["headers"]).get(b"authorization", b"")) or app
        await app(scope, receive, counted)

    def _refusal(self, address: str, given: bytes) -> Response | None:
        now, wrong = time.monotonic(), self._wrong.get(address, deque(maxlen=NUM_WRONG_TOKENS))
        if len(wrong) == NUM_WRONG_TOKENS and now - wrong[0] < WRONG_TOKENS_S:
            return _error_response(429, "too many wrong tokens; wait a minute")
        if hmac.compare_digest(given, b"Bearer " + self._token):
            return None
        wrong.append(now)
        self._wrong.pop(address, None)
        self._wrong[address] = wrong
        while len(self._wrong) > NUM_ADDRESSES:
            del self._wrong[next(iter(self._wrong))]
        return _error_response(401, "the token is missing or wrong")


async def _json_body(request: Request) -> Json:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise TooLong(f"a request of more than {MAX_JSON_BYTES} bytes; ask for fewer sequences at a time")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("the body is not JSON") from None
    if not isinstance(asked, dict):
        raise UsageError("the body is no JSON object")
    return asked


def _status(error: Exception) -> int:
    statuses: dict[type[Exception], int] = {UnknownFile: 404, Conflict: 409, TooLong: 413, UsageError: 400, WeightsError: 422}
    return next((status for kind, status in statuses.items() if isinstance(error, kind)), 500)


def _error_response(status: int, message: str) -> Response:
    return JSONResponse({"error": {"class": "UsageError", "message": message, "offenders": []}}, status, {"Connection": "close"})
