"""Layer by layer: the learner's activations against those of the same model with an artifact's weights, both by transformers in float32.

Every module without children (a linear layer, a norm, the rotary embedding) of the second model is given what the learner's own was given,
so that an error shows where it arises (`local_error`) and not only where it ends up (`error`, both models run from the tokens on).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deploy_targets.errors import ArtifactError, MissingPackageError
from deploy_targets.fingerprint import read_fingerprint
from deploy_targets.gguf_file import GGUF_FILE, read_gguf
from deploy_targets.inspection import Activations, ModuleDeparture, kind_of
from deploy_targets.manifest import Manifest
from deploy_targets.onnx_file import graph_settings
from deploy_targets.preflight import model_shapes
from deploy_targets.probes import ProbeSet
from deploy_targets.quantizers.model_files import read_config
from deploy_targets.saved_names import saved_views
from deploy_targets.stored_weights import read_stored

NUM_SEQUENCES = 8
DEPARTS = 0.02
"""Relative error of a module's output that rounding to few bits may always make."""
_FACTOR = 3.0
"""A module departs where its local error is beyond this many times what its weights lost at export, or is usual in its kind."""
_ROUNDED = 1e-4

Call = tuple[tuple[Any, ...], dict[str, Any], Any]


def compare_activations(folder: Path, manifest: Manifest, probes: ProbeSet, learner_dir: Path) -> Activations:
    """Hold the artifact in `folder` against the learner in `learner_dir`, on the first of the policy's probes.

    Raises `MissingPackageError` without PyTorch, `UsageError` for a folder that transformers cannot load, `ArtifactError` for an artifact
    of another model.
    """
    try:
        import torch

        from hetero_rl.learner.model import load_causal_lm
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "torch", "--bisect", "train") from error
    learner = load_causal_lm(learner_dir, dtype=torch.float32).eval()
    reference = _reference(folder, manifest, learner_dir)
    sequences = [probe.sequence.tokens for probe in probes.of_kind("policy").probes[:NUM_SEQUENCES]]
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    with torch.no_grad():
        for tokens in sequences:
            ids = torch.tensor([tokens])
            with _recorded(learner) as wanted:
                learner(input_ids=ids, use_cache=False)
            with _recorded(reference) as found:
                reference(input_ids=ids, use_cache=False)
            modules = dict(reference.named_modules())
            for name, (arguments, keywords, output) in wanted.items():
                local = modules[name](*arguments, **keywords)
                for place, difference in enumerate((_distance(local, output), _distance(found[name][2], output), _distance(output, None))):
                    squares[name][place] += difference
    fingerprint = read_fingerprint(folder)
    errors = {} if fingerprint is None else {name: mark.error for name, mark in fingerprint.tensors.items()}
    return departures(squares, len(sequences), errors)


def departures(squares: Mapping[str, Sequence[float]], num_sequences: int, errors: Mapping[str, float]) -> Activations:
    """From the squared norms (local difference, difference, output) of each module, in the order they run.

    `errors`: tensor -> distance from the learner's that is known from the export; where it is empty, modules of one kind are compared.
    """
    relative = {name: [float(np.sqrt(part / max(whole, 1e-30))) for part in parts] for name, (*parts, whole) in squares.items()}
    kinds: dict[str, list[float]] = defaultdict(list)
    finite = {name: local for name, (local, _) in relative.items() if np.isfinite(local)}
    for name, local in finite.items():
        kinds[kind_of(name)].append(local)
    rounded = _lower_median([local for local in finite.values() if local > _ROUNDED])

    def usual(name: str) -> float:
        if errors:
            return max((error for tensor, error in errors.items() if tensor.startswith(f"{name}.")), default=0.0)
        return max(_lower_median(kinds[kind_of(name)]), rounded) if len(kinds[kind_of(name)]) > 1 else rounded

    modules = tuple(
        ModuleDeparture(name, local, error, not local <= max(DEPARTS, _FACTOR * usual(name))) for name, (local, error) in relative.items()
    )
    return Activations(num_sequences, modules)


def _lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0


def _distance(one: Any, other: Any) -> float:
    """Squared distance of two tensors, or of tuples of tensors; of `one` to zero without `other`. NaN is infinitely far."""
    if isinstance(one, tuple | list):
        others = [None] * len(one) if other is None else other
        return sum(_distance(a, b) for a, b in zip(one, others, strict=True))
    if not hasattr(one, "float"):
        return 0.0
    value = float(((one if other is None else one - other).double() ** 2).sum())
    return value if np.isfinite(value) else float("inf")


@contextmanager
def _recorded(model: Any) -> Iterator[dict[str, Call]]:
    """Module without children -> its last call, in the order they ran."""
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):

                def hook(module: Any, arguments: Any, keywords: Any, output: Any, name: str = name) -> None:
                    calls[name] = (arguments, keywords, output)

                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield calls


def _reference(folder: Path, manifest: Manifest, learner_dir: Path) -> Any:
    """The model that transformers makes by the artifact's settings, with its weights in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hetero_rl.learner import attention

    learner_config, shapes = read_config(learner_dir), model_shapes(learner_dir)
    config = AutoConfig.for_model(**_served_config(folder, learner_config))
    implementation = "sdpa" if torch.cuda.is_available() else attention.register()
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).eval()
    stored = read_stored(folder, learner_config, shapes, manifest.profile.scheme.name).tensors
    problems = []
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            for saved, view in saved_views(name, parameter, shapes):
                if saved not in stored or stored[saved].shape != tuple(view.shape):
                    problems.append(saved)
                else:
                    view.copy_(torch.from_numpy(stored[saved].whole()))
    if problems:
        raise ArtifactError(
            f"{folder} is no artifact of the model in {learner_dir}: {', '.join(problems[:5])} are not in it or of another shape"
        )
    return reference


def _served_config(folder: Path, learner_config: Mapping[str, Any]) -> dict[str, Any]:
    """The learner's config.json with what the artifact says in its place."""
    config = dict(learner_config)
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text("utf-8"))
    theta = None
    if (folder / "model.onnx").is_file():
        theta = graph_settings(folder / "model.onnx").get("rope_theta")
    if (folder / GGUF_FILE).is_file():
        metadata = read_gguf(folder / GGUF_FILE).metadata
        theta = metadata.get(f"{metadata.get('general.architecture')}.rope.freq_base")
    rope = config.get("rope_parameters") or {}
    if theta is not None and rope.get("rope_type", "default") == "default":
        config["rope_parameters"] = {**rope, "rope_theta": theta}
    config.pop("quantization_config", None)
    return config
