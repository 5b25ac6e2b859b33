"""Where the high-fidelity model comes from: the shipped demo, a folder, or the hub."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from deploy_targets.errors import UsageError


def resolve_model(path: str) -> Path:
    """The local folder of a model: `demo`, a folder, or a hub id (downloaded: config, tokenizer and safetensors only).

    Raises:
        UsageError: no such folder and no such hub model, or a folder without `config.json` or without safetensors weights.
    """
    folder = Path(str(resources.files("hetero_rl") / "data" / "demo_model")) if path == "demo" else Path(path).expanduser()
    if not folder.is_dir():
        folder = _from_hub(path)
    if not (folder / "config.json").is_file():
        raise UsageError(f"model.path = {path!r}: {folder} holds no config.json; give the folder of a transformers causal LM, or a hub id")
    if not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"model.path = {path!r}: {folder} holds no *.safetensors weights; pickled weights are never loaded. "
            "Convert them with transformers' save_pretrained on a machine that trusts them"
        )
    return folder.resolve()


def _from_hub(path: str) -> Path:
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UsageError(f"model.path = {path!r}: there is no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"model.path = {path!r} is neither a folder nor a model that the hub gives: {reason}") from None


def load_tokenizer(model_dir: Path) -> Any:
    """The model's own tokenizer; no code from the model is run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"the tokenizer in {model_dir} cannot be loaded: {error}") from None


def stop_tokens(model_dir: Path, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end-of-text token and those of `generation_config.json`."""
    ids: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    generation_config = model_dir / "generation_config.json"
    if generation_config.is_file():
        eos = json.loads(generation_config.read_text("utf-8")).get("eos_token_id")
        ids |= set(eos) if isinstance(eos, list) else set() if eos is None else {int(eos)}
    return tuple(sorted(ids))
