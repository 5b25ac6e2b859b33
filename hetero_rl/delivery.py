"""An artifact on its way to the machine that serves it: signed, packed, unpacked, held against a key, and put behind an engine."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy_targets.artifact import MANIFEST_FILE, Manifest, check_artifact
from deploy_targets.catalog import open_engine
from deploy_targets.errors import ArtifactError, UsageError
from deploy_targets.protocols import Engine
from deploy_targets.signing import check_private_key, check_public_key, sign_artifact, verify_artifact
from deploy_targets.types import Server
from deploy_targets.weights_file import sha256_of
from hetero_rl.run_folder import check_output

if TYPE_CHECKING:
    from rich.console import Console


_FOREIGN = "What another tool made is held against probes of its model: give --probes FILE (hetero-rl probe MODEL) and --target NAME"


def sign_and_pack(console: Console, folder: Path, bundle: Path | None, sign: Path | None) -> None:
    """Sign the artifact in `folder` with the key `sign` and pack it into the file `bundle`, where they are given; print its sha256."""
    if sign is not None:
        sign_artifact(folder, sign)
    if bundle is not None:
        from deploy_targets.bundle import write_bundle

        write_bundle(folder, bundle)
        console.print(f"bundle   {bundle} ({bundle.stat().st_size / 2**20:.1f} MiB)", highlight=False, soft_wrap=True)
    console.print(f"sha256   {sha256_of(folder / MANIFEST_FILE)} (of {MANIFEST_FILE})", highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Trust:
    """What `verify-deploy` was told about keys."""

    require_signature: bool = False
    public_key: Path | None = None
    sign_report: Path | None = None

    def check(self, json_file: Path | None) -> None:
        """Raises `UsageError` for options that want each other, and for a key that is none."""
        if self.require_signature != (self.public_key is not None):
            raise UsageError("--require-signature and --public-key KEY.pem go together: a signature is held against a key that you have")
        if self.public_key is not None:
            check_public_key(self.public_key)
        if self.sign_report is not None:
            if json_file is None:
                raise UsageError("--sign-report signs the JSON report: give --json FILE too")
            check_private_key(self.sign_report)


def checked_artifact(path: Path, keep: Path | None, trust: Trust, stack: ExitStack) -> tuple[Path, Manifest]:
    """The folder of an artifact, or of a bundle that is unpacked for the life of `stack` or into `keep`; and its manifest.

    Every byte of it was held against the manifest, and against the signature where `trust` requires one. Raises `ArtifactError`.
    """
    if not path.is_file():
        if keep is not None:
            raise UsageError(f"--keep unpacks a bundle, and {path} is none")
        if path.is_dir() and not (path / MANIFEST_FILE).exists():
            raise ArtifactError(
                f"{path} has no {MANIFEST_FILE}, which an export writes last: it did not finish, or this is none. {_FOREIGN}"
            )
        manifest = check_artifact(path)
        if trust.public_key is not None:
            verify_artifact(path, trust.public_key)
        return path, manifest
    from deploy_targets.bundle import unpack_bundle

    if path.suffix == ".gguf":
        raise ArtifactError(f"{path} is a GGUF file, not a bundle. {_FOREIGN}")
    if keep is not None and keep.exists():
        raise UsageError(f"{keep} exists already; give another --keep")
    check_output(keep, "--keep")
    folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hetero-rl-"))) / "artifact"
    return folder, unpack_bundle(path, folder, trust.public_key)


def opened_engine(folder: Path, manifest: Manifest, server: str | None, model: str | None) -> tuple[Engine, Server | None]:
    """The engine of the artifact's profile, started on `folder`; or one that asks the `server` at a URL, and what that says of itself."""
    if server is None:
        return open_engine(manifest.profile, folder, manifest.weight_version), None
    from deploy_targets.engines.http_json import API_KEY_VARIABLE
    from deploy_targets.engines.server import ServerEngine

    engine = ServerEngine(
        server, folder, manifest.weight_version,
        max_model_len=manifest.profile.max_model_len, model=model, api_key=os.environ.get(API_KEY_VARIABLE) or None,
    )  # fmt: skip
    return engine, engine.server
