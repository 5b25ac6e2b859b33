"""`hetero-rl target-agent`: its arguments, checked, and the server that runs until it is told to end."""

from __future__ import annotations

import ipaddress
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy_targets.errors import MissingPackageError, PreflightError, UsageError
from deploy_targets.preflight import check_target
from deploy_targets.profile import TargetProfile

FEWEST_TOKEN_CHARS = 16


@dataclass(frozen=True, slots=True)
class Binding:
    """Where the service listens: `host`, `port`, and the certificate and key (PEM) of TLS, if any."""

    host: str
    port: int
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def url(self) -> str:
        """What clients are given."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{shown}:{self.port}"


def parse_binding(bind: str, tls_cert: Path | None, tls_key: Path | None, *, plain_http: bool) -> Binding:
    """HOST:PORT with its certificate. Raises `UsageError` for one that is none, or that others could listen in on."""
    host, colon, port = bind.rpartition(":")
    host = host.strip("[]")
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise UsageError(f"--bind {bind} is not HOST:PORT, e.g. 127.0.0.1:8470")
    if (tls_cert is None) != (tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    for path in (tls_cert, tls_key):
        if path is not None and not path.is_file():
            raise UsageError(f"{path} does not exist")
    if tls_cert is None and not plain_http and not _is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, and without TLS they can read the token and the weights: give --tls-cert and "
            "--tls-key, or --plain-http where the network itself is trusted (a tunnel, a private link)"
        )
    return Binding(host, int(port), tls_cert, tls_key)


def read_token(path: Path) -> str:
    """The token of clients. Raises `UsageError` for a file that is missing, that others can read, or whose token can be guessed."""
    try:
        token, mode = path.read_text("utf-8").strip(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        make = f"python -c 'import secrets; print(secrets.token_hex(32))' > {path} && chmod 600 {path}"
        raise UsageError(f"the token file {path} cannot be read: {getattr(error, 'strerror', None) or error}. Make one: {make}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"the token file {path} can be read by others: chmod 600 {path}")
    if len(token) < FEWEST_TOKEN_CHARS or not (token.isascii() and token.isprintable()) or " " in token:
        raise UsageError(f"the token in {path} must have at least {FEWEST_TOKEN_CHARS} printable characters without spaces")
    return token


def serve(
    profile: TargetProfile, binding: Binding, token: str, folder: Path | None, max_file_bytes: int, say: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises `PreflightError` where the target does not run here, `MissingPackageError` without the extra.
    """
    reasons = check_target(profile)
    if reasons:
        raise PreflightError(f"target {profile.name!r} cannot run on this machine", reasons)
    try:
        import uvicorn

        from deploy_targets.agent.host import Host
        from deploy_targets.agent.service import make_app
    except ModuleNotFoundError as error:
        raise MissingPackageError(str(error.name), "the target agent", "agent") from None
    with tempfile.TemporaryDirectory(prefix="target-agent-", dir=folder) as scratch:
        host = Host(profile, Path(scratch), max_file_bytes)
        say(f"serving {profile.name} at {binding.url}; end with Ctrl-C")
        uvicorn.run(
            make_app(host, token, max_file_bytes), host=binding.host, port=binding.port, log_level="warning", access_log=False,
            ssl_certfile=binding.tls_cert, ssl_keyfile=binding.tls_key, server_header=False, timeout_keep_alive=600, proxy_headers=False,
        )  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
