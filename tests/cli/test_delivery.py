"""From the machine of the export to the one that serves, by the command line: packed, signed, unpacked, verified, or refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy_targets.manifest import SIGNATURE_FILE
from deploy_targets.weights_file import sha256_of
from tests.artifacts import VERSION, make_artifact
from tests.command_line import fails, hetero_rl
from tests.conftest import TinyModels
from tests.servers import FakeServer, fake_server


@pytest.fixture(scope="module")
def artifact(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the fake engine, without a task: it passes."""
    folder = tmp_path_factory.mktemp("delivery") / "artifact"
    make_artifact(tiny_models("qwen3"), folder, accuracy=None)
    return folder


@pytest.fixture(scope="module")
def bundle(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "out.tar.zst"
    result = hetero_rl("export", artifact, "--bundle", path, cwd=path.parent)
    assert result.returncode == 0, result.stderr
    assert sha256_of(artifact / "manifest.json") in result.stdout
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with key.pem, pub.pem and other.pem, another public one."""
    folder = tmp_path_factory.mktemp("keys")
    for name, public in (("key", "pub"), ("other-key", "other")):
        openssl(folder, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem")
        openssl(folder, "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{public}.pem")
    openssl(folder, "genrsa", "-out", "rsa.pem", "2048")
    openssl(folder, "ec", "-in", "key.pem", "-aes256", "-passout", "pass:secret", "-out", "locked.pem")
    return folder


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def server(artifact: Path) -> Iterator[FakeServer]:
    with fake_server(artifact, "vllm", VERSION) as running:
        yield running


def test_a_bundle_verifies_as_its_artifact_does(artifact: Path, bundle: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    reports = []
    for source in (artifact, bundle):
        result = hetero_rl("verify-deploy", source, "--json", "v.json", cwd=tmp_path, TMPDIR=str(scratch))
        assert result.returncode == 0, result.stdout + result.stderr
        reports.append(json.loads((tmp_path / "v.json").read_text()))
    for name in ("verdict", "artifact_sha256", "gap", "gates"):
        assert reports[0][name] == reports[1][name]
    assert reports[1]["artifact_sha256"] == sha256_of(artifact / "manifest.json")
    assert reports[1]["engine"]["server"] is None
    assert not list(scratch.iterdir())


def test_the_unpacked_artifact_can_be_kept(artifact: Path, bundle: Path, tmp_path: Path) -> None:
    assert hetero_rl("verify-deploy", bundle, "--keep", "there", cwd=tmp_path).returncode == 0
    assert {path.name for path in (tmp_path / "there").iterdir()} == {path.name for path in artifact.iterdir()}
    fails(hetero_rl("verify-deploy", bundle, "--keep", "there", cwd=tmp_path), 2, "there exists already")


def test_a_refused_bundle_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.tar.zst").write_bytes(data)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    for arguments in ((), ("--keep", "there")):
        result = hetero_rl("verify-deploy", "bad.tar.zst", "--json", "v.json", *arguments, cwd=tmp_path, TMPDIR=str(scratch))
        fails(result, 1, "bundle bad.tar.zst")
        assert {path.name for path in tmp_path.rglob("*")} == {"bad.tar.zst", "tmp"}


def test_options_of_export_that_do_not_fit(artifact: Path, tmp_path: Path) -> None:
    fails(hetero_rl("export", artifact, cwd=tmp_path), 2, "--bundle FILE", "--sign KEY")
    fails(hetero_rl("export", "run", cwd=tmp_path), 2, "--out FOLDER, --bundle FILE or both")
    fails(hetero_rl("export", artifact, "--out", "a", cwd=tmp_path), 2, "is an artifact already", "run folder")
    fails(hetero_rl("export", artifact, "--bundle", "b", "--target", "fake", cwd=tmp_path), 2, "is an artifact already")
    fails(hetero_rl("export", artifact, "--bundle", artifact / "b.tar.zst", cwd=tmp_path), 2, "lies in the artifact")
    fails(hetero_rl("export", "run", "--out", "a", "--bundle", "a/b.tar.zst", cwd=tmp_path), 2, "there is no folder a")
    fails(hetero_rl("export", artifact, "--bundle", "nowhere/b", cwd=tmp_path), 2, "there is no folder nowhere")
    fails(hetero_rl("export", "run", "--bundle", "b.tar.zst", cwd=tmp_path), 2, "run holds no run")
    (tmp_path / "b").write_text("mine")
    fails(hetero_rl("export", artifact, "--bundle", "b", cwd=tmp_path), 2, "b exists already")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "mine"}


def test_options_of_verify_that_do_not_fit(artifact: Path, bundle: Path, tmp_path: Path) -> None:
    fails(hetero_rl("verify-deploy", artifact, "--keep", "there", cwd=tmp_path), 2, "--keep unpacks a bundle")
    fails(hetero_rl("verify-deploy", bundle, "--keep", "nowhere/there", cwd=tmp_path), 2, "there is no folder nowhere")
    fails(hetero_rl("verify-deploy", bundle, "--model", "tiny", cwd=tmp_path), 2, "--server URL")
    fails(hetero_rl("verify-deploy", bundle, "--require-signature", cwd=tmp_path), 2, "--public-key")
    fails(hetero_rl("verify-deploy", bundle, "--public-key", "pub.pem", cwd=tmp_path), 2, "--require-signature")
    fails(hetero_rl("verify-deploy", bundle, "--bisect", cwd=tmp_path), 2, "--learner")
    fails(hetero_rl("verify-deploy", bundle, "--sign-report", "key.pem", cwd=tmp_path), 2, "--json FILE")
    assert not list(tmp_path.iterdir())


# A server that runs already


def test_a_running_server(bundle: Path, server: FakeServer, tmp_path: Path) -> None:
    result = hetero_rl("verify-deploy", bundle, "--server", server.url, "--json", "v.json", "--html", "v.html", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{server.url}, vllm 0.32.0, model tiny" in result.stdout
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["gap"]["mean"] < 1e-6
    assert report["engine"]["server"] == {
        "url": server.url, "model": "tiny", "software": "vllm", "version": "0.32.0", "max_model_len": 512, "is_local": True,
    }  # fmt: skip
    assert (report["engine"]["name"], report["engine"]["options"]) == ("vllm", None)
    assert report["engine"]["versions"] == {"hetero-rl": report["engine"]["versions"]["hetero-rl"], "vllm": "0.32.0"}
    assert "0.32.0" in (tmp_path / "v.html").read_text()


def test_a_server_with_other_weights_fails(bundle: Path, server: FakeServer, tmp_path: Path) -> None:
    server.engine._bias[::2] += 2.0
    result = hetero_rl("verify-deploy", bundle, "--server", server.url, cwd=tmp_path)
    assert result.returncode == 3, result.stdout + result.stderr
    assert "FAIL" in result.stdout


def test_the_key_of_a_server_comes_from_the_environment(bundle: Path, server: FakeServer, tmp_path: Path) -> None:
    server.key = "secret"
    command = ("verify-deploy", bundle, "--server", server.url, "--json", "v.json")
    fails(hetero_rl(*command, cwd=tmp_path), 2, "401", "HETERO_RL_API_KEY")
    result = hetero_rl(*command, cwd=tmp_path, HETERO_RL_API_KEY="secret")
    assert result.returncode == 0, result.stderr
    assert "secret" not in result.stdout + result.stderr + (tmp_path / "v.json").read_text()


def test_no_server_answers(bundle: Path, server: FakeServer, tmp_path: Path) -> None:
    fails(hetero_rl("verify-deploy", bundle, "--server", "localhost", cwd=tmp_path), 2, "is no address of a server")
    fails(hetero_rl("verify-deploy", bundle, "--server", "http://127.0.0.1:1", cwd=tmp_path), 1, "connection refused")
    fails(
        hetero_rl("verify-deploy", bundle, "--server", server.url, "--model", "large", cwd=tmp_path), 2, "does not serve the model 'large'"
    )


# Signatures


@pytest.fixture(scope="module")
def signed(artifact: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the artifact, signed where it lay."""
    pytest.importorskip("model_signing")
    folder = tmp_path_factory.mktemp("signed")
    shutil.copytree(artifact, folder / "artifact")
    result = hetero_rl("export", "artifact", "--sign", keys / "key.pem", "--bundle", "signed.tar.zst", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "artifact" / SIGNATURE_FILE).is_file()
    return folder / "signed.tar.zst"


def required(key: Path) -> tuple[str | Path, ...]:
    return ("--require-signature", "--public-key", key)


def test_a_signed_bundle(signed: Path, keys: Path, tmp_path: Path) -> None:
    for source in (signed, signed.parent / "artifact"):
        assert hetero_rl("verify-deploy", source, *required(keys / "pub.pem"), cwd=tmp_path).returncode == 0
        assert hetero_rl("verify-deploy", source, cwd=tmp_path).returncode == 0
        refused = hetero_rl("verify-deploy", source, *required(keys / "other.pem"), cwd=tmp_path)
        fails(refused, 1, f"{source} is not what was signed by the key of", "other.pem")


def test_a_signature_that_is_required_and_missing(bundle: Path, artifact: Path, keys: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    for source in (bundle, artifact):
        fails(hetero_rl("verify-deploy", source, *required(keys / "pub.pem"), cwd=tmp_path), 1, f"{source} has no signature", "--sign")
    fails(hetero_rl("verify-deploy", bundle, *required(keys / "pub.pem"), "--keep", "there", cwd=tmp_path), 1, "has no signature")
    assert not list(tmp_path.iterdir())


def test_an_artifact_resealed_after_it_was_signed(signed: Path, tiny_models: TinyModels, keys: Path, tmp_path: Path) -> None:
    """Its own hashes all hold: only the signature can tell."""
    make_artifact(tiny_models("qwen3"), tmp_path / "artifact", accuracy=None, tolerance=0.5)
    shutil.copy(signed.parent / "artifact" / SIGNATURE_FILE, tmp_path / "artifact")
    assert hetero_rl("verify-deploy", "artifact", cwd=tmp_path).returncode == 0
    fails(hetero_rl("verify-deploy", "artifact", *required(keys / "pub.pem"), cwd=tmp_path), 1, "is not what was signed")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[" * 100_000])
def test_a_signature_that_is_none(artifact: Path, keys: Path, tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("model_signing")
    shutil.copytree(artifact, tmp_path / "artifact")
    (tmp_path / "artifact" / SIGNATURE_FILE).write_bytes(data)
    fails(hetero_rl("verify-deploy", "artifact", *required(keys / "pub.pem"), cwd=tmp_path), 1, "is not what was signed")


def test_keys_that_are_none(artifact: Path, signed: Path, keys: Path, tmp_path: Path) -> None:
    for key in ("rsa.pem", "locked.pem", "pub.pem", "nowhere.pem"):
        fails(hetero_rl("export", artifact, "--sign", keys / key, "--bundle", "b", cwd=tmp_path), 2, "no private key that can sign", "PEM")
    for key in ("rsa.pem", "key.pem", "nowhere.pem"):
        fails(hetero_rl("verify-deploy", signed, *required(keys / key), cwd=tmp_path), 2, "is no public key", "PEM")
    assert not list(tmp_path.iterdir())


def test_a_signed_report(signed: Path, keys: Path, tmp_path: Path) -> None:
    """Read by the tool of the package itself, as the one does who was sent the report."""
    result = hetero_rl("verify-deploy", signed, "--json", "v.json", "--sign-report", keys / "key.pem", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert model_signing(tmp_path, keys / "pub.pem", "v.json", "v.json.sig") == 0
    assert model_signing(tmp_path, keys / "other.pem", "v.json", "v.json.sig") != 0
    (tmp_path / "v.json").write_text((tmp_path / "v.json").read_text().replace('"pass"', '"warn"', 1))
    assert model_signing(tmp_path, keys / "pub.pem", "v.json", "v.json.sig") != 0


def test_the_packages_own_tool_reads_the_signature(signed: Path, keys: Path) -> None:
    artifact = signed.parent / "artifact"
    assert model_signing(signed.parent, keys / "pub.pem", artifact, artifact / SIGNATURE_FILE) == 0
    assert model_signing(signed.parent, keys / "other.pem", artifact, artifact / SIGNATURE_FILE) != 0


def model_signing(cwd: Path, key: Path, model: str | Path, signature: str | Path) -> int:
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", signature, "--public_key", key, model]
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert "No such option" not in done.stderr, done.stderr
    return done.returncode
