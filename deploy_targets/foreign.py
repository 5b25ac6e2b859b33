"""An artifact that hetero-rl did not make: found, held against the vocabulary of the probes, and described in place of a manifest.

Nothing says which bytes such an artifact should have, what gap it was made for, or what it scored on a task. Its files are hashed all the
same, so that a report binds to what was measured.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy_targets.errors import ArtifactError, UsageError
from deploy_targets.gguf_file import GGUF_FILE, read_gguf
from deploy_targets.hardware import describe_machine, package_versions
from deploy_targets.manifest import FORMAT_VERSION, FileRecord, Manifest, SamplingRecord
from deploy_targets.memory import max_tokens
from deploy_targets.probes import ProbeSet
from deploy_targets.profile import TargetProfile
from deploy_targets.vocabulary import TOKENIZER_FILE, read_vocabulary
from deploy_targets.weights_file import sha256_of

_NEEDED = {"onnxruntime": ("model.onnx", "genai_config.json"), "transformers": ("config.json",), "vllm": ("config.json",)}
"""Engine -> files that a folder must have; those of plug-ins look for themselves."""


def find_artifact(path: Path, profile: TargetProfile, scratch: Path) -> Path:
    """The folder that the profile's engine opens for the artifact at `path`, a folder or a GGUF file.

    A GGUF file of another name is linked into the empty folder `scratch`. Raises `ArtifactError` naming what is missing.
    """
    engine = profile.engine.name
    if engine == "llamacpp":
        return _find_gguf(path, scratch)
    if not path.is_dir():
        raise ArtifactError(f"artifact {path} is no folder, and that is what the engine {engine!r} of target {profile.name!r} opens")
    missing = [name for name in _NEEDED.get(engine, ()) if not (path / name).is_file()]
    if engine in ("transformers", "vllm") and not list(path.glob("*.safetensors")):
        missing.append("*.safetensors (pickled weights are never loaded)")
    if missing:
        raise ArtifactError(
            f"artifact {path} cannot be served by {engine!r}, the engine of target {profile.name!r}: no {', '.join(missing)}"
        )
    return path


def foreign_manifest(folder: Path, profile: TargetProfile, probes: ProbeSet) -> Manifest:
    """What is known of the artifact in `folder`, as served by `profile` at its tolerance; not sealed (`Manifest.is_sealed`).

    Raises `ArtifactError` where its vocabulary is not that of `probes`, `UsageError` where a probe is longer than the target allows.
    """
    assert profile.tolerance is not None
    config = _check_vocabulary(folder, profile, probes)
    longest, limit = max(len(probe.sequence.tokens) for probe in probes.probes), max_tokens(profile, config)
    if longest > limit:
        raise UsageError(
            f"the probes have up to {longest} tokens, and target {profile.name!r} serves {limit}: record them with that --target, "
            "or raise max_model_len in a profile of your own"
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Manifest(
        format_version=FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hetero_rl_version=package_versions().get("hetero-rl", "unknown"),
        profile=profile,
        scheme=profile.scheme.name,
        weight_version=probes.weight_version,
        source_model=probes.source_model or folder.name,
        floor=None,
        tolerance=profile.tolerance,
        sampling=SamplingRecord(max_tokens=max(len(p.learner_logps) for p in probes.of_kind("policy").probes), stop_token_ids=()),
        final_gap=None,
        task=None,
        package_versions={},
        machine=describe_machine(),
        files={path.relative_to(folder).as_posix(): FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size) for path in files},
        tensors={},
        entry_sha256={},
    )


def _find_gguf(path: Path, scratch: Path) -> Path:
    if path.is_dir() and (path / GGUF_FILE).is_file():
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.is_file() else []
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ArtifactError(f"artifact {path} must be one GGUF file or a folder with one, and there is {names}; give the file itself")
    os.symlink(found[0].resolve(), scratch / GGUF_FILE)
    tokenizer = found[0].parent / TOKENIZER_FILE
    if path.is_dir() and tokenizer.is_file():
        os.symlink(tokenizer.resolve(), scratch / TOKENIZER_FILE)
    return scratch


def _check_vocabulary(folder: Path, profile: TargetProfile, probes: ProbeSet) -> dict[str, Any]:
    """The keys of the artifact's configuration that bound what it serves."""
    config = _configuration(folder, profile)
    size = config.get("vocab_size")
    beyond = max(max(probe.sequence.tokens) for probe in probes.probes)
    if isinstance(size, int) and (size != (probes.vocab_size or size) or beyond >= size):
        of = f"one of {probes.vocab_size}" if probes.vocab_size else f"tokens up to {beyond}"
        raise ArtifactError(f"{folder} has a vocabulary of {size} tokens, and the probes have {of}: they are of another model")
    tokenizer = folder / TOKENIZER_FILE
    if tokenizer.is_file() and probes.vocabulary_sha256 and read_vocabulary(tokenizer).sha256 != probes.vocabulary_sha256:
        raise ArtifactError(
            f"{tokenizer} gives tokens other ids than the tokenizer of the probed model {probes.source_model!r}: texts would become "
            "other tokens. Put the model's own tokenizer there, or probe the model that this artifact was made from"
        )
    return config


def _configuration(folder: Path, profile: TargetProfile) -> dict[str, Any]:
    if profile.engine.name == "llamacpp":
        header = read_gguf(folder / GGUF_FILE)
        return {"vocab_size": header.num_embeddings, "max_position_embeddings": header.context_length}
    name = "genai_config.json" if profile.engine.name == "onnxruntime" else "config.json"
    try:
        config = json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}
        if name == "genai_config.json":
            return {"vocab_size": config["model"]["vocab_size"], "max_position_embeddings": config["model"]["context_length"]}
        return {**config, **config.get("text_config", {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{folder / name} cannot be read: {error!r}") from None
