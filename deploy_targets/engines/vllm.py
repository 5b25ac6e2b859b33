"""vLLM, in this process: bf16 and compressed-tensors checkpoints on CPU or GPU.

On CPU, vLLM sets thread affinity and torch options of the whole process: host it in a process of its own
(`engine.process = "own"`, see process.py). Written against vLLM 0.20 to 0.32, with nothing but its public API.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from safetensors import safe_open

from deploy_targets.engines.requests import (
    check_layout,
    check_sequences,
    folder_layout,
    parse_options,
    read_limits,
    response_limits,
)
from deploy_targets.engines.vllm_options import VllmOptions, temperature_problem
from deploy_targets.errors import EngineError, UsageError
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile


class VllmEngine:
    """Serves one folder in Hugging Face layout through `vllm.LLM`."""

    def __init__(self, artifact_dir: Path, options: Mapping[str, Any], weight_version: int) -> None:
        """Load the folder. Raises `ProfileError` for wrong options and `EngineError` when vLLM cannot serve it."""
        self._options = parse_options(VllmOptions, options, "vllm")
        self._max_model_len, self._vocab_size = read_limits(artifact_dir, self._options.max_model_len)
        self._layout = folder_layout(artifact_dir)
        self.weight_version = weight_version
        # In-process engine core: weights and log-probs cross no process border within vLLM, and torch.manual_seed reaches the sampler.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_INT4_W4A8"] = str(int(self._options.cpu_int4_w4a8))
        try:
            self._llm: Any = vllm.LLM(**self._llm_arguments(artifact_dir))
        except Exception as error:
            raise EngineError(f"vLLM {vllm.__version__} cannot serve {artifact_dir}: {type(error).__name__}: {error}") from error
        self._is_cpu = bool(vllm.platforms.current_platform.is_cpu())

    def _llm_arguments(self, artifact_dir: Path) -> dict[str, Any]:
        options = self._options
        optional = {
            "kv_cache_memory_bytes": None if options.kv_cache_gib is None else int(options.kv_cache_gib * 2**30),
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
        }
        return {
            "model": str(artifact_dir),
            "dtype": options.dtype,
            "enforce_eager": options.enforce_eager,
            "kv_cache_dtype": options.kv_cache_dtype,
            "attention_config": {"backend": options.attention_backend},
            "enable_prefix_caching": options.enable_prefix_caching,
            # vLLM always generates a token, also when it only scores: one more than the longest sequence.
            "max_model_len": self._max_model_len + 1,
            # ... and refuses more than the model says it has positions for. The extra position is never computed.
            "hf_overrides": {"max_position_embeddings": self._max_model_len + 1} if self._is_model_limit(artifact_dir) else {},
            "max_logprobs": max(1, min(self._vocab_size, options.max_logprobs)),
            # Log-probs after temperature; the default is those of the raw logits.
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "skip_tokenizer_init": True,
            "load_format": "safetensors",
            "trust_remote_code": False,
            "disable_log_stats": True,
            **{key: value for key, value in optional.items() if value is not None},
        }

    def _is_model_limit(self, artifact_dir: Path) -> bool:
        return read_limits(artifact_dir, self._max_model_len + 1)[0] == self._max_model_len

    def update(self, weights: WeightFile) -> int:
        """Reload in place from the file; drops the prefix cache. The names, shapes and dtypes are checked before."""
        llm = self._open_llm()
        check_layout(self._layout, weights.path)
        try:
            # `weights_path` would have vLLM read every safetensors file of a folder; the iterator reads this file alone.
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _read_tensors(weights.path)})
            llm.reset_prefix_cache()
        except Exception as error:
            self.close()
            raise EngineError(f"vLLM failed while it loaded {weights.path}: {type(error).__name__}: {error}. It was shut down") from error
        self.weight_version = weights.weight_version
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Sample with log-probs from vLLM's own sampler (`logprobs_mode="processed_logprobs"`)."""
        llm = self._open_llm()
        limits = response_limits(prompts, sampling.max_tokens, self._max_model_len, self._vocab_size)
        requests = list(zip(map(tuple, prompts), limits, strict=True))
        # Equal neighbours are draws of one request; vLLM refuses several greedy ones ("n must be 1 when using greedy sampling").
        runs = [(*key, len(list(run))) for key, run in groupby(requests)] if sampling.temperature > 0 else [(*key, 1) for key in requests]
        seeds: list[int | None] = [None] * len(runs)
        if sampling.temperature > 0 and not self._is_cpu:
            seeds = [int(seed) for seed in np.random.default_rng(sampling.seed).integers(2**62, size=len(runs))]
        params = [
            vllm.SamplingParams(
                n=count,
                temperature=sampling.temperature,
                max_tokens=limit,
                seed=seed,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for (_, limit, count), seed in zip(runs, seeds, strict=True)
        ]
        with torch.random.fork_rng(enabled=self._is_cpu, devices=[]):
            if self._is_cpu:
                # A generator per request costs a few percent of the throughput on CPU, and the call is the unit of determinism.
                torch.manual_seed(sampling.seed)
            outputs = self._run(llm, [prompt for prompt, _, _ in runs], params)
        # Cached blocks change how a later equal call is computed, by a rounding error: same call, same log-probs.
        llm.reset_prefix_cache()
        return [
            Generation(
                prompt=prompt,
                tokens=np.array(completion.token_ids, dtype=np.int32),
                logps=np.array(completion.logprobs.logprobs, dtype=np.float32),
                weight_version=self.weight_version,
                temperature=sampling.temperature,
                finish_reason="stop" if completion.finish_reason == "stop" else "length",
            )
            for (prompt, _, _), output in zip(runs, outputs, strict=True)
            for completion in output.outputs
        ]

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Teacher-forced log-probs by `prompt_logprobs`.

        vLLM gives these at temperature 1 whatever is asked; another temperature needs the log-probs of the whole
        vocabulary. Raises `UsageError` when that is larger than the option `max_logprobs`.
        """
        llm = self._open_llm()
        check_sequences(sequences, temperature, self._max_model_len, self._vocab_size)
        problem = temperature_problem(self._options, temperature, self._vocab_size)
        if problem is not None:
            raise UsageError(problem)
        num_top = 1 if temperature == 1 else self._vocab_size
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=num_top, flat_logprobs=True, detokenize=False, ignore_eos=True
        )
        outputs = self._run(llm, [sequence.tokens for sequence in sequences], params)
        llm.reset_prefix_cache()
        return [self._scores(sequence, output.prompt_logprobs, temperature) for sequence, output in zip(sequences, outputs, strict=True)]

    def _scores(self, sequence: TokenSequence, flat: Any, temperature: float) -> TokenScores:
        # Each position lists the given token first, then the most probable ones in order; the very first position has none.
        begin = flat.start_indices[sequence.prompt_len]
        num_scored = len(sequence.tokens) - sequence.prompt_len
        logps = np.array(flat.logprobs[begin:], dtype=np.float32).reshape(num_scored, -1)
        token_ids = np.array(flat.token_ids[begin:], dtype=np.int32).reshape(num_scored, -1)
        given_logps = logps[:, 0].copy()
        if temperature != 1:
            scaled = logps.astype(np.float64) / temperature
            top = scaled[:, 1]
            given_logps = (scaled[:, 0] - top - np.log(np.exp(scaled[:, 1:] - top[:, None]).sum(axis=1))).astype(np.float32)
        return TokenScores(
            logps=given_logps,
            greedy_tokens=token_ids[:, 1].copy(),
            weight_version=self.weight_version,
            temperature=temperature,
        )

    def _run(self, llm: Any, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
        try:
            return list(llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False))
        except Exception as error:
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error

    def _open_llm(self) -> Any:
        if self._llm is None:
            raise EngineError("this vLLM engine is closed")
        return self._llm

    def close(self) -> None:
        """Shut the engine core down and free its memory."""
        llm, self._llm = self._llm, None
        if llm is not None:
            # `LLM` has no shutdown of its own (up to 0.32); without one the memory is freed when the interpreter ends.
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


def _read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)
