"""Signatures of artifacts and reports by the OpenSSF's model-signing, with a key of one's own (https://pypi.org/project/model-signing).

A signature is a sigstore bundle over the names and sha256 of the files it signs: `model_signing verify key` reads it too. Keyless signing,
by an identity and with a transparency log, is that tool's own command where there is a network: `model_signing sign sigstore ARTIFACT
--signature ARTIFACT/model.sig`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy_targets.errors import ArtifactError, MissingPackageError, UsageError
from deploy_targets.manifest import SIGNATURE_FILE

_KEYS = "It must be a PEM file without a password, of a key on the curve P-256, P-384 or P-521 (openssl ecparam -name prime256v1 -genkey)"


def sign_artifact(folder: Path, private_key: Path) -> None:
    """Write the signature of all else in `folder`, its manifest too; one that was there is replaced. Raises `UsageError` for the key."""
    _sign(folder, folder / SIGNATURE_FILE, private_key)


def sign_file(path: Path, private_key: Path) -> Path:
    """Write the signature of the file `path` to a file of the same name and `.sig`, and return that. Raises `UsageError` for the key."""
    signature = path.with_name(path.name + ".sig")
    _sign(path, signature, private_key)
    return signature


def check_private_key(private_key: Path) -> None:
    """Before the hours are spent: raises `UsageError` for a key that cannot sign, `MissingPackageError` where the package is missing."""
    _signer(private_key)


def check_public_key(public_key: Path) -> None:
    """Raises `UsageError` for what is no public key, `MissingPackageError` where the package is missing."""
    _verifier(public_key)


def verify_artifact(folder: Path, public_key: Path) -> None:
    """Hold every byte of `folder` against its signature.

    Raises `ArtifactError` for an artifact that has none, or one that another key made or of other bytes; what `check_public_key` raises.
    """
    signature = folder / SIGNATURE_FILE
    verifier, hashing = _verifier(public_key)
    if not signature.is_file():
        raise ArtifactError(f"artifact {folder} has no signature ({SIGNATURE_FILE}), and one is required. Export it with --sign KEY")
    try:
        verifier.set_hashing_config(_ignoring(hashing, signature)).verify(folder, signature)
    except Exception as error:  # of several libraries
        raise ArtifactError(
            f"artifact {folder} is not what was signed by the key of {public_key}: {_said(error)}. Another key signed it, or it was changed"
        ) from None


def _sign(path: Path, signature: Path, private_key: Path) -> None:
    signer, hashing = _signer(private_key)
    signer.set_hashing_config(_ignoring(hashing, signature)).sign(path, signature)


def _signer(private_key: Path) -> tuple[Any, Any]:
    signing, _, hashing = _package()
    try:
        return signing.Config().use_elliptic_key_signer(private_key=private_key), hashing
    except Exception as error:
        raise UsageError(f"{private_key} is no private key that can sign: {_said(error)}. {_KEYS}") from None


def _verifier(public_key: Path) -> tuple[Any, Any]:
    _, verifying, hashing = _package()
    try:
        return verifying.Config().use_elliptic_key_verifier(public_key=public_key), hashing
    except Exception as error:
        raise UsageError(f"{public_key} is no public key: {_said(error)}. {_KEYS}; openssl ec -pubout writes the public one") from None


def _ignoring(hashing: Any, signature: Path) -> Any:
    return hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)


def _package() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "model_signing", "a signature", "sign") from None
    return signing, verifying, hashing


def _said(error: Exception) -> str:
    """What a library said, on one line; the name of the error where it said nothing."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
