"""Tokens per second through our engines against the runtimes under them, on the same requests, in turns.

Targets of vLLM: `ProcessEngine` (its own process, results over a socket) against `vllm.LLM.generate` called inside an equal process.
Targets of ONNX Runtime and llama.cpp: our engine against a hand-written decode loop (bare_onnx.py, bare_llamacpp.py), in the faster of two
thread layouts. Targets of transformers: our engine against `model.generate` with the log-probs of its tokens.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import bare_llamacpp, bare_onnx, models
from benchmarks.common import Measurement, arguments, in_turns, measurement, write
from benchmarks.publish_targets import runnable
from benchmarks.worker import Worker, serve
from deploy_targets.catalog import open_engine
from deploy_targets.engines.environment import child_environment
from deploy_targets.profile import TargetProfile, load_profile
from deploy_targets.types import Sampling

PROMPT_TOKENS = 8
LAYOUTS = ("one_batch", "rows_split")
RATIO_OF = "tokens/s of the wrapper / of the raw runtime"
Prompts = list[list[int]]
Run = tuple[float, int]
"""Seconds and sampled tokens of one call."""


def wrapper_body(connection: Connection, profile: TargetProfile, folder: Path, prompts: Prompts, group_size: int, max_tokens: int) -> None:
    """Answers with (seconds, sampled tokens) of one `generate` of our engine."""
    engine = open_engine(profile, folder, 0)
    repeated = [prompt for prompt in prompts for _ in range(group_size)]

    def generate(seed: int) -> Run:
        start = time.perf_counter()
        generations = engine.generate(repeated, Sampling(max_tokens, seed=seed))
        return time.perf_counter() - start, sum(len(generation.tokens) for generation in generations)

    try:
        serve(connection, generate)
    finally:
        engine.close()


def raw_vllm_body(connection: Connection, profile: TargetProfile, folder: Path, prompts: Prompts, group_size: int, max_tokens: int) -> None:
    """Answers with (seconds, sampled tokens) of one `vllm.LLM.generate`, with the arguments that our engine gives it."""
    import torch
    import vllm

    options = profile.engine.options
    llm = vllm.LLM(
        model=str(folder),
        dtype=options.get("dtype", "bfloat16"),
        kv_cache_dtype=options.get("kv_cache_dtype", "auto"),
        enforce_eager=options["enforce_eager"],
        enable_prefix_caching=True,
        kv_cache_memory_bytes=int(options["kv_cache_gib"] * 2**30),
        # The tiny models have 512 positions; the target allows more than either side needs.
        max_model_len=512,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        skip_tokenizer_init=True,
        load_format="safetensors",
        disable_log_stats=True,
    )
    params = vllm.SamplingParams(
        n=group_size, temperature=1.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False
    )

    def generate(seed: int) -> Run:
        torch.manual_seed(seed)
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    try:
        serve(connection, generate)
    finally:
        llm.llm_engine.engine_core.shutdown()


def raw_transformers_body(
    connection: Connection, profile: TargetProfile, folder: Path, prompts: Prompts, group_size: int, max_tokens: int
) -> None:
    """Answers with (seconds, sampled tokens) of one `generate` of transformers that returns the log-prob of every token."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(profile.engine.options["num_threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, profile.engine.options.get("dtype", "bfloat16")))
    ids = torch.tensor(prompts)

    def generate(seed: int) -> Run:
        torch.manual_seed(seed)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                num_return_sequences=group_size,
                do_sample=True,
                top_k=0,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
            model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)
        return time.perf_counter() - start, out.sequences[:, len(prompts[0]) :].numel()

    serve(connection, generate)


def speeds(sides: dict[str, Callable[[int], Run]], rounds: int, num_tokens: int) -> dict[str, list[float]]:
    """Tokens per second of each side, round by round; every round has a seed of its own. Two warm-up rounds."""
    seeds = {side: count() for side in sides}

    def run(side: str) -> float:
        seconds, sampled = sides[side](next(seeds[side]))
        if sampled != num_tokens:
            raise RuntimeError(f"{side} sampled {sampled} tokens instead of {num_tokens}")
        return sampled / seconds

    return in_turns({side: lambda side=side: run(side) for side in sides}, rounds, warmups=2)


def measure_bare(folder: Path, profile: TargetProfile, prompts: Prompts, group_size: int, max_tokens: int, rounds: int) -> Measurement:
    """Our engine against the bare loop of its runtime."""
    num_threads = profile.engine.options["num_threads"]
    bare_body = BARE[profile.engine.name]
    with ExitStack() as stack:
        ours = stack.enter_context(Worker(wrapper_body, profile, folder, prompts, group_size, max_tokens))
        bare = stack.enter_context(Worker(bare_body, folder, prompts, group_size, max_tokens, num_threads))
        sides: dict[str, Callable[[int], Run]] = {"wrapper": ours}
        sides |= {layout: lambda seed, layout=layout: bare(layout, seed) for layout in LAYOUTS}
        found = speeds(sides, rounds, len(prompts) * group_size * max_tokens)
    # One layout for all rounds: the better of two noisy figures in each round would be noise in the baseline's favour.
    best = max(LAYOUTS, key=lambda layout: median(found[layout]))
    runs: dict[str, Any] = {f"{layout}_runs": found[layout] for layout in LAYOUTS}
    return measurement(found["wrapper"], "tokens/s", baseline=found[best], ratio_of=RATIO_OF, layout=best, **runs)


def measure_vllm(folder: Path, profile: TargetProfile, prompts: Prompts, group_size: int, max_tokens: int, rounds: int) -> Measurement:
    """Our process border around vLLM against vLLM called directly, both under the environment that the border sets up."""
    request = (profile, folder, prompts, group_size, max_tokens)
    environ = {**child_environment(profile, os.environ), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_INT4_W4A8": "1"}
    with Worker(wrapper_body, *request) as ours, Worker(raw_vllm_body, *request, environ=environ) as raw:
        found = speeds({"wrapper": ours, "raw": raw}, rounds, len(prompts) * group_size * max_tokens)
    return measurement(found["wrapper"], "tokens/s", baseline=found["raw"], ratio_of=RATIO_OF)


def measure_transformers(
    folder: Path, profile: TargetProfile, prompts: Prompts, group_size: int, max_tokens: int, rounds: int
) -> Measurement:
    """Our engine against transformers' own generation."""
    request = (profile, folder, prompts, group_size, max_tokens)
    with Worker(wrapper_body, *request) as ours, Worker(raw_transformers_body, *request) as raw:
        found = speeds({"wrapper": ours, "raw": raw}, rounds, len(prompts) * group_size * max_tokens)
    return measurement(found["wrapper"], "tokens/s", baseline=found["raw"], ratio_of=RATIO_OF)


BARE = {"llamacpp": bare_llamacpp.body, "onnxruntime": bare_onnx.body}
MEASURES: dict[str, Callable[..., Measurement]] = {
    "llamacpp": measure_bare,
    "onnxruntime": measure_bare,
    "transformers": measure_transformers,
    "vllm": measure_vllm,
}


def main() -> None:
    known = [name for name in runnable() if load_profile(name).engine.name in MEASURES]
    options = arguments("rollout", __doc__, rounds=9, targets=known, sizes=list(models.SIZES))
    num_prompts, group_size, max_tokens = (4, 4, 16) if options.quick else (32, 8, 64)
    size = (options.sizes or ["tiny"])[0]
    cases = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model_dir = models.tiny(folder / "model", quick=True) if options.quick else models.SIZES[size](folder / "model")
        model = models.describe(model_dir)
        prompts: Prompts = np.random.default_rng(0).integers(3, model["vocab_size"], size=(num_prompts, PROMPT_TOKENS)).tolist()
        for target in options.targets or ["int4-onnx", "int4-vllm"]:
            profile = models.profile_for(target, options.threads)
            served = models.serving_folder(profile, model_dir, folder / target)
            measure = MEASURES[profile.engine.name]
            cases[target] = measure(served, profile, prompts, group_size, max_tokens, options.rounds)
    settings = {"model": model, "num_prompts": num_prompts, "samples_per_prompt": group_size, "prompt_tokens": PROMPT_TOKENS}
    write(options, cases, next(iter(cases)), {**settings, "response_tokens": max_tokens})


if __name__ == "__main__":
    main()
