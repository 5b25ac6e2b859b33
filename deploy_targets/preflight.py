"""Model x scheme x engine x hardware, checked before a minute is spent; every offender is listed at once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy_targets.artifact import checked_layout
from deploy_targets.catalog import ENGINES, extra_of, make_quantizer, name_problems, resolve
from deploy_targets.device import needs_gpu, runs_on_gpu
from deploy_targets.engines.onnx_options import missing_provider
from deploy_targets.engines.options import RETURN_ROUTES, options_problems
from deploy_targets.engines.vllm_options import VllmOptions, temperature_problem
from deploy_targets.errors import ArtifactError, ListedError, PreflightError, UsageError
from deploy_targets.families import family_offenders, is_expert, routes_problem
from deploy_targets.hardware import describe_machine, find_gpus, gpu_compute_capability, gpu_memory_gib
from deploy_targets.memory import max_tokens, memory_offenders
from deploy_targets.profile import TargetProfile
from deploy_targets.types import WEIGHTS_FILE

INDEX_FILE = "model.safetensors.index.json"
_MATHS_AFTER_HEAD: Mapping[str, float | None] = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "output_logit_soft_cap": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
}
"""Keys of config.json that change logits between the output head and the softmax -> the value at which they change nothing.

Learners that take the head's product as the logits, and engines each in their own way, would disagree without an error.
"""


def check_target(profile: TargetProfile) -> list[str]:
    """Why the target cannot run on this machine, one line each; empty when it can.

    Looks at names, packages, devices and the options of shipped engines without importing an engine: importing some of them takes many
    seconds. ONNX Runtime alone is asked for its execution providers where the target needs another one than the CPU's.
    """
    reasons = name_problems("engine", profile.engine.name) + name_problems("quantizer", profile.scheme.quantizer)
    missing = [package for package in profile.hardware.packages if not _is_installed(package)]
    if missing:
        extra = extra_of(profile)
        fix = f"; install it with: pip install 'hetero-rl[{extra}]'" if extra else ""
        reasons.append(f"package {', '.join(repr(package) for package in missing)} is not installed{fix}")
    options = profile.engine.options
    asks_cuda = needs_gpu(profile)
    if asks_cuda and not find_gpus():
        reasons.append("it needs a CUDA GPU, and none is found here (nvidia-smi lists none, or CUDA_VISIBLE_DEVICES hides it)")
    memory_gib, found_gib = profile.hardware.memory_gib, gpu_memory_gib()
    # A card sold as 24 GB shows a little less.
    if asks_cuda and memory_gib is not None and found_gib is not None and found_gib < 0.95 * memory_gib:
        reasons.append(f"it needs a GPU with {memory_gib:g} GiB, and the one here has {found_gib:.1f} GiB")
    least, capability = profile.hardware.min_compute_capability, gpu_compute_capability()
    if least is not None and capability is not None and capability < least and runs_on_gpu(profile):
        reasons.append(f"its kernels need a GPU of compute capability {least:g} or more, and the one here has {capability:g}")
    missing_features = sorted(set(profile.hardware.cpu_features) - set(describe_machine().cpu_features))
    if missing_features and not find_gpus():
        reasons.append(f"its kernels need a CPU with {', '.join(missing_features)}, or a GPU; this machine has neither")
    wrong_options = options_problems(profile.engine.name, options)
    if profile.engine.name == "onnxruntime" and not wrong_options:
        reasons += missing_provider(options)
    return reasons + wrong_options


def preflight(
    profile: TargetProfile, model_dir: Path, *, num_tokens: int | None = None, temperature: float | None = None, also: Sequence[str] = ()
) -> None:
    """Check the model of `model_dir` against the target; reads the headers of its weights, never the data.

    `num_tokens` (the longest prompt + response) and `temperature` (0: greedy) are those of the run that is planned; None
    leaves them unchecked. `also` are offenders that the caller found. Raises `PreflightError` with everything at once, one line
    each: a machine that cannot run the target, files that are missing or damaged, tensors that do not fit the scheme, a tokenizer
    beyond the vocabulary, logits that learner and engine would compute differently, sequences or a temperature that the engine
    would refuse later.
    """
    offenders = [*also, *check_target(profile)]
    profile = _without_wrong_options(profile)
    shapes: dict[str, tuple[int, ...]] = {}
    config: dict[str, Any] = {}
    try:
        shapes = model_shapes(model_dir)
    except UsageError as error:
        offenders.append(str(error))
    try:
        config = read_object(model_dir / "config.json")
        # What a scheme says about the tensors of a model that is not supported is noise.
        offenders += family_offenders(config, shapes) or _scheme_offenders(profile, model_dir, config, shapes)
    except UsageError as error:
        offenders.append(str(error))
    offenders += _tokenizer_offenders(model_dir, config, shapes)
    text_config = _text_config(config)
    offenders += _head_offenders(text_config)
    offenders += _length_offenders(profile, text_config, num_tokens) + _rope_offenders(profile, text_config)
    offenders += _engine_offenders(profile, text_config, temperature) + _routes_offenders(profile, text_config)
    if offenders:
        raise PreflightError(
            f"model {model_dir.name!r} and target {profile.name!r} (scheme {profile.scheme.name}) do not fit",
            list(dict.fromkeys(offenders)),
            "Choose another target (`hetero-rl targets check` shows what runs here), list the layers under `ignore` in a profile of "
            "your own, or change the model",
        )


def check_model(model_dir: Path) -> dict[str, Any]:
    """What every use of a model needs, whatever the target: weights that are read, a tokenizer within the vocabulary, a plain output head.

    Returns the keys of its `config.json` that are the language model's. Raises `PreflightError` with everything at once.
    """
    offenders: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    config: dict[str, Any] = {}
    try:
        config = _text_config(read_object(model_dir / "config.json"))
        shapes = model_shapes(model_dir)
    except UsageError as error:
        offenders.append(str(error))
    offenders += _tokenizer_offenders(model_dir, config, shapes) + _head_offenders(config)
    if offenders:
        raise PreflightError(f"model {model_dir.name!r} cannot be used", offenders)
    return config


def model_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Hugging Face checkpoint, one file or shards, from the headers alone.

    Raises `UsageError` for a folder without safetensors weights, a shard that is missing, or a header that does not parse.
    """
    index = model_dir / INDEX_FILE
    if (model_dir / WEIGHTS_FILE).is_file():
        shards = {WEIGHTS_FILE}
    elif index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            raise UsageError(f"{index} has no weight_map of tensors to files in its own folder")
        shards = set(weight_map.values())
    else:
        raise UsageError(
            f"{model_dir} holds no {WEIGHTS_FILE} and no {INDEX_FILE}; pickled weights are never loaded. "
            "Save the model with save_pretrained, which writes safetensors"
        )
    try:
        return {name: entry[1] for shard in sorted(shards) for name, entry in checked_layout(model_dir / shard).items()}
    except ArtifactError as error:
        raise UsageError(f"{model_dir}: {error}") from error


def _scheme_offenders(
    profile: TargetProfile, model_dir: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What the quantizer says about the tensors, or about its scheme; experts without a kernel; whether the model fits the memory."""
    try:
        quantizer = make_quantizer(profile, model_dir)
    except ListedError as error:
        return list(error.offenders)
    offenders = quantizer.offenders(shapes) + memory_offenders(profile, quantizer, _text_config(config), shapes)
    # vLLM 0.32: "No WNA16 MoE backend", no FP8 one for per-channel scales; the others are for CPUs with AMX and were not tried.
    if profile.engine.name == "vllm" and not find_gpus() and any(is_expert(name) and quantizer.quantizes(name) for name in shapes):
        offenders.append(
            f"vLLM runs no {profile.scheme.name} experts (mixture-of-experts kernels) on CPUs; keep them in high precision by "
            """scheme.ignore = ["lm_head", 're:.*\\.experts\\.'] in a profile of your own, serve this model in BF16, or use a GPU"""
        )
    return offenders


def _tokenizer_offenders(model_dir: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tokens whose id the model has no logit for."""
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        return [f"{path} is missing; save the tokenizer with save_pretrained, which writes it"]
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises the bare class for every malformed file
        return [f"{path} is no readable tokenizer: {error}"]
    rows = [
        config.get("vocab_size"),
        *(size for name, shape in shapes.items() if name.endswith("embed_tokens.weight") for size in shape[:1]),
    ]
    vocab_size = min((size for size in rows if isinstance(size, int)), default=None)
    beyond = {token: index for token, index in vocabulary.items() if vocab_size is not None and index >= vocab_size}
    if not beyond:
        return []
    token, index = max(beyond.items(), key=lambda item: item[1])
    return [f"tokenizer.json: {len(beyond)} tokens have ids beyond the model's vocabulary of {vocab_size}, e.g. {token!r} with id {index}"]


def _head_offenders(config: Mapping[str, Any]) -> list[str]:
    """Settings of the model by which logits are more than the output head's product."""
    return [
        f"config.json: {key} = {config[key]!r} changes the logits after the output head, which the learner does not repeat; "
        f"choose a model without it"
        for key, neutral in _MATHS_AFTER_HEAD.items()
        if config.get(key) is not None and config[key] != neutral
    ]


def _length_offenders(profile: TargetProfile, config: Mapping[str, Any], num_tokens: int | None) -> list[str]:
    """Limits that the longest sequence of a run exceeds; engines would cut its response short instead."""
    if num_tokens is None:
        return []
    max_model_len = profile.engine.options.get("max_model_len", profile.max_model_len)
    limits = [
        ("max_model_len of the target", max_model_len, "raise it in a profile of your own"),
        ("max_position_embeddings of the model", config.get("max_position_embeddings"), "choose a model with more positions"),
    ]
    return [
        f"a prompt with its response can take {num_tokens} tokens, and {name} is {limit}; shorten prompts or responses, or {way_out}"
        for name, limit, way_out in limits
        if isinstance(limit, int) and num_tokens > limit
    ]


def _rope_offenders(profile: TargetProfile, config: Mapping[str, Any]) -> list[str]:
    """LongRoPE beyond the lengths of its short factors: transformers changes factors by a batch's length, vLLM by `max_model_len`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return []
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    # vLLM is given one position more than the longest sequence has.
    longest = max_tokens(profile, config) + 1
    if not isinstance(original, int) or longest <= original:
        return []
    return [
        f"config.json: LongRoPE has other factors beyond {original} positions, and engines do not agree on when they apply; "
        f"set max_model_len to at most {original - 1} in a profile of your own"
    ]


def _engine_offenders(profile: TargetProfile, config: Mapping[str, Any], temperature: float | None) -> list[str]:
    """Pairs of model and engine that are known not to run."""
    if profile.engine.name not in ENGINES and profile.engine.process == "shared":
        # It is imported in this process anyway; better before anything has started.
        try:
            resolve("engine", profile.engine.name, extra_of(profile))
        except ListedError as error:
            return list(error.offenders)
    vocab_size = config.get("vocab_size")
    if profile.engine.name != "vllm" or not isinstance(vocab_size, int):
        return []
    # Greedy tokens are scored at temperature 1.
    problem = temperature_problem(VllmOptions.model_validate(profile.engine.options), temperature or 1.0, vocab_size)
    return [] if problem is None else [problem]


def _routes_offenders(profile: TargetProfile, config: Mapping[str, Any]) -> list[str]:
    """Routes that are asked for and cannot be told."""
    problem = routes_problem(config) if config and profile.engine.options.get(RETURN_ROUTES) else None
    return [] if problem is None else [f"engine.options.return_routes: {problem}; leave it out"]


def _without_wrong_options(profile: TargetProfile) -> TargetProfile:
    """`profile` with those `[engine.options]` alone that validate: what follows calculates with them."""
    engine = profile.engine
    options = {key: value for key, value in engine.options.items() if not options_problems(engine.name, {key: value})}
    return profile.model_copy(update={"engine": engine.model_copy(update={"options": options})})


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the language model; models of several modalities keep them in a table of their own."""
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # the parent of a dotted name is missing
        return False


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `UsageError`."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object")
    return value
