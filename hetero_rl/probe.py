"""Golden probes of a model that hetero-rl never trained: it samples them itself, and says what it thinks of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from deploy_targets.errors import ListedError, UsageError
from deploy_targets.fingerprint import sketch_weights
from deploy_targets.gates import MIN_SEQUENCES
from deploy_targets.memory import max_tokens
from deploy_targets.preflight import check_model
from deploy_targets.probes import KINDS, ProbeSet
from deploy_targets.profile import ProbeSpec, TargetProfile
from deploy_targets.types import Sampling, TokenSequence
from deploy_targets.vocabulary import TOKENIZER_FILE, read_vocabulary
from hetero_rl.config import RunConfig
from hetero_rl.learner.reader import ReadOnlyModel
from hetero_rl.model import load_tokenizer, resolve_model, stop_tokens
from hetero_rl.probing import CERTAIN_POOL, enough_policy, make_probes, num_scored
from hetero_rl.tasks import load_task
from hetero_rl.tasks.base import encode_prompt

DEFAULT_LEN = 512
"""Longest sequence where no target names one: what the shortest of the shipped targets serves."""
_BATCH = 64
_PREFIX = 8
"""Sampled tokens after which a greedy continuation may begin, where there are too few prompts."""
_MOST_LINES = 10


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of each prompt, and where they came from, in words."""

    tokens: tuple[tuple[int, ...], ...]
    source: str


def record_model(
    path: str, config: RunConfig, profile: TargetProfile | None, prompts_file: Path | None, *, of_task: bool, num_tokens: int | None
) -> tuple[ProbeSet, Prompts]:
    """Probes of the model at `path`, a folder or a hub id, and the prompts it was given.

    Prompts are those of `prompts_file`, of the config's task (`of_task`), or the beginning of a text. Length and temperature of responses
    are those of `config.loop`; sizes and the longest sequence those of `profile`; `num_tokens` wins over its size.

    Raises `UsageError` for everything that does not fit, before the model is loaded.
    """
    model_dir = resolve_model(path)
    model_config = check_model(model_dir)
    tokenizer = load_tokenizer(model_dir)
    spec = profile.probes if profile else ProbeSpec()
    if num_tokens is not None:
        spec = ProbeSpec.model_validate({**spec.model_dump(), "num_tokens": num_tokens})
    limit = max_tokens(profile, model_config) if profile else min(DEFAULT_LEN, model_config.get("max_position_embeddings", DEFAULT_LEN))
    if prompts_file is not None:
        prompts = read_prompts(prompts_file, tokenizer)
    elif of_task:
        task = load_task(config.task, tokenizer, config.loop.seed)
        problems = task.heldout_problems(config.evaluation.num_final_problems)
        prompts = Prompts(tuple(task.encode_prompt(problem) for problem in problems), f"{len(problems)} held-out problems of the task")
    else:
        prompts = unconditional(tokenizer)
    _check_prompts(prompts, config.loop.max_response_tokens, limit, model_config.get("vocab_size"))

    vocabulary = read_vocabulary(model_dir / TOKENIZER_FILE)
    model = ReadOnlyModel(model_dir, config.learner, config.loop.temperature)
    sampling = Sampling(config.loop.max_response_tokens, config.loop.temperature, config.loop.seed, stop_tokens(model_dir, tokenizer))
    policy, greedy = sampled(model, prompts.tokens, sampling, spec)
    if (num_different := len(set(policy))) < MIN_SEQUENCES:
        raise UsageError(
            f"the model's samples are {num_different} different sequences over and over (prompts: {prompts.source}), and a verdict cannot "
            "rest on that. Give prompts that it has more to say about: --prompts FILE"
        )
    probes = make_probes(spec, model, policy, greedy, max_len=limit, ordinary_ids=vocabulary.ordinary_ids, seed=config.loop.seed)
    probe_set = ProbeSet(
        probes,
        config.loop.temperature,
        weight_version=0,
        learner_dtype=model.compute_dtype,
        source_model=model_dir.name if Path(path).exists() or path == "demo" else path,
        vocab_size=model.vocab_size,
        vocabulary_sha256=vocabulary.sha256,
        weights=sketch_weights(model_config, stored_tensors(model_dir)),
    )
    return probe_set, prompts


def stored_tensors(model_dir: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The weights of a checkpoint, in shards or not, one after the other."""
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name).float().numpy()


def sampled(
    model: ReadOnlyModel, prompts: Sequence[tuple[int, ...]], sampling: Sampling, spec: ProbeSpec
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Samples in the size of the policy's share, and greedy continuations for their share and for near-certain tokens.

    Prompts are taken in turns, so that a few are enough. Greedy continuations of a prompt are all the same: where there are too few
    prompts, samples go on greedily after their first tokens.
    """
    policy: list[TokenSequence] = []
    while (enough := enough_policy(spec, policy)) is None:
        batch = [prompts[(len(policy) + i) % len(prompts)] for i in range(_BATCH)]
        seeded = Sampling(sampling.max_tokens, sampling.temperature, sampling.seed + len(policy), sampling.stop_token_ids)
        policy += model.generate(batch, seeded)
    policy = policy[:enough]
    greedy: list[TokenSequence] = []
    begun = dict.fromkeys([*prompts, *(s.tokens[: s.prompt_len + _PREFIX] for s in policy if num_scored(s) > _PREFIX)])
    rest: Iterator[tuple[int, ...]] = iter(begun)
    wanted = spec.num_tokens * (spec.greedy + CERTAIN_POOL * spec.certain)
    while sum(map(num_scored, greedy)) < wanted and (batch := list(islice(rest, _BATCH))):
        greedy += model.generate(batch, Sampling(sampling.max_tokens, 0.0, stop_token_ids=sampling.stop_token_ids))
    return policy, greedy


def summary(probes: ProbeSet, prompts: Prompts, path: Path, target: str | None) -> dict[str, str]:
    """What the command prints, line by line: name -> text."""
    longest = max(len(probe.sequence.tokens) for probe in probes.probes)
    return {
        "prompts": prompts.source,
        "tokens": ", ".join(f"{probes.num_scored(kind):,} {kind}" for kind in KINDS) + f"; up to {longest} in a sequence",
        "model": f"{probes.source_model} in {probes.learner_dtype} arithmetic, temperature {probes.temperature:g}",
        "probes": str(path),
        "next:": f"hetero-rl verify-deploy ARTIFACT --probes {path} --target {target or 'NAME'} --tolerance 0.02",
    }


def unconditional(tokenizer: Any) -> Prompts:
    """One prompt: the token that begins a text. Raises `UsageError` for a tokenizer that has none."""
    for name in ("bos_token", "eos_token"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None:
            return Prompts(((int(index),),), f"none: the model's own samples after {getattr(tokenizer, name)!r}")
    raise UsageError("the tokenizer has no token that begins or ends a text, so there is nothing to sample from; give prompts: --prompts")


def read_prompts(path: Path, tokenizer: Any) -> Prompts:
    """Prompts of a JSON-lines file: `{"prompt": text or chat messages}` or `{"prompt_tokens": [ids]}`; other keys are left alone.

    Raises `ListedError` for lines that are neither, or hold no token; `UsageError` for a file that cannot be read or is empty.
    """
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read: {error}") from None
    prompts, wrong = [], []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(_prompt(json.loads(line), tokenizer))
        except (ValueError, RecursionError, TypeError) as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = [f"and {len(wrong) - _MOST_LINES} more"] if len(wrong) > _MOST_LINES else []
        raise ListedError(
            f"--prompts {path} holds lines that are no prompts", wrong[:_MOST_LINES] + more,
            'Each line is {"prompt": "text"}, {"prompt": [chat messages]} or {"prompt_tokens": [ids]}',
        )  # fmt: skip
    return Prompts(tuple(prompts), f"{len(prompts)} of {path}")


def _prompt(row: object, tokenizer: Any) -> tuple[int, ...]:
    if not isinstance(row, Mapping) or ("prompt" in row) == ("prompt_tokens" in row):
        raise ValueError("it must have either the key prompt or the key prompt_tokens")
    if "prompt" in row:
        prompt = row["prompt"]
        is_chat = isinstance(prompt, list) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)
        if not isinstance(prompt, str) and not is_chat:
            raise ValueError("prompt must be text or a list of chat messages")
        return encode_prompt(tokenizer, prompt)
    tokens = row["prompt_tokens"]
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError("prompt_tokens must be a list of one token id or more")
    return tuple(tokens)


def _check_prompts(prompts: Prompts, max_response: int, limit: int, vocab_size: int | None) -> None:
    beyond = max(map(max, prompts.tokens))
    if vocab_size is not None and beyond >= vocab_size:
        raise UsageError(f"the prompts hold the token id {beyond}, and the model's vocabulary has {vocab_size}")
    longest = max(map(len, prompts.tokens))
    if longest + max_response > limit:
        raise UsageError(
            f"a prompt of {longest} tokens with a response of up to {max_response} is longer than {limit}, the most that target and model "
            "allow. Shorten it, lower loop.max_response_tokens with --set, or give a --target with a longer max_model_len"
        )
