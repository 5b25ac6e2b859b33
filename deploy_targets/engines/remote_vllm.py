"""A vLLM server that runs already, as an engine that takes updates: its OpenAI API samples and scores, its RL endpoints change weights.

    POST /collective_rpc          reload_weights from a folder that both machines see; vLLM's own transfers want NCCL, CUDA IPC or RDMA
    POST /reset_prefix_cache      what was cached came from the old weights
    POST /update_weight_version   a label of ours; GET /weight_info gives it back until the server is started anew, or another changes it
    GET  /server_info             how the server was started: what this target cannot be served with is refused

These exist where the server was started with VLLM_SERVER_DEV_MODE=1 (docs/scale.md has the commands). Written against vLLM 0.32.

The label is how a restart between two updates is found out: every answer is followed by a look at it, and an engine whose label is gone
fails, is taken out of the pool, and starts with the weights of now. That the weights are those of the label shows in the proof.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from pydantic import BaseModel, Field

from deploy_targets.engines.http_json import JsonServer, NotFoundError, StatusError
from deploy_targets.engines.requests import check_layout, check_sequences, folder_layout, parse_options, read_limits, response_limits
from deploy_targets.engines.server_answers import parsed
from deploy_targets.engines.server_vllm import VllmServer
from deploy_targets.engines.vllm_options import VllmOptions
from deploy_targets.errors import EngineError, ListedError, UsageError
from deploy_targets.profile import TargetProfile
from deploy_targets.types import WEIGHTS_FILE, Generation, Sampling, TokenScores, TokenSequence, WeightFile

NUM_CONNECTIONS = 32
"""Prompts that are asked for at once. Each has a seed of its own, and vLLM's API takes one seed for a request."""
_START = "Start it as docs/scale.md says"


class _Model(BaseModel):
    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


class _ModelConfig(BaseModel):
    quantization: str | None
    dtype: str
    logprobs_mode: str
    max_logprobs: int


class _CacheConfig(BaseModel):
    cache_dtype: str


class _VllmConfig(BaseModel):
    model: _ModelConfig = Field(alias="model_config")
    cache: _CacheConfig = Field(alias="cache_config")


class _Environment(BaseModel):
    cpu_int4_w4a8: bool | None = Field(None, alias="VLLM_CPU_INT4_W4A8")


class _Info(BaseModel):
    vllm_config: _VllmConfig
    vllm_env: _Environment


class _WeightInfo(BaseModel):
    weight_version: str


class _Reset(BaseModel):
    success: bool


class RemoteVllmEngine:
    """The engine protocol over vLLM's own HTTP. The server goes on after `close`, with the weights it was given last."""

    def __init__(
        self,
        profile: TargetProfile,
        artifact_dir: Path,
        weight_version: int,
        *,
        url: str,
        api_key: str | None = None,
        ca_file: Path | None = None,
        folder: Path | None = None,
        folder_there: str | None = None,
        call_timeout_s: float = 3600.0,
    ) -> None:
        """Check how the server was started, and bring it to the weights of `artifact_dir`.

        `folder`: where updates are put for the server, beside `artifact_dir` where unset; `folder_there`: its path on the server's machine,
        where that is another. `call_timeout_s` bounds each request.

        Raises `UsageError` for an address or key that is none, a server that was not started for this target, or one that does not see
        the folder, and `EngineError` for one that cannot be reached or fails.
        """
        options = parse_options(VllmOptions, {"max_model_len": profile.max_model_len, **profile.engine.options}, "vllm")
        self._max_model_len, vocab_size = read_limits(artifact_dir, options.max_model_len)
        self._vocab_size, self._layout = vocab_size, folder_layout(artifact_dir)
        self.url, self._token, self._lock = url, secrets.token_hex(8), threading.Lock()
        self._folder = (folder or Path(artifact_dir).parent / "updates").resolve()
        self._folder_there = folder_there or str(self._folder)
        self._http = JsonServer(url, api_key, call_timeout_s, key_name="token_file", ca_file=ca_file)
        self._idle: SimpleQueue[JsonServer] = SimpleQueue()
        for _ in range(NUM_CONNECTIONS):
            self._idle.put(self._http.another())
        self._label, self._served_from = "", ""
        self.weight_version = weight_version
        try:
            model = self._model()
            self._require_start(options, artifact_dir, model)
            self._api = VllmServer(self._http, model.id, model.max_model_len, vocab_size, weight_version)
            self._require_sight()
            self._load(WeightFile(Path(artifact_dir) / WEIGHTS_FILE, weight_version))
        except BaseException:
            self.close()
            raise

    def update(self, weights: WeightFile) -> int:
        """Put the file where the server sees it and have it loaded in place. Names, shapes and dtypes are checked before."""
        check_layout(self._layout, weights.path)
        with self._lock:
            self._require_label()
            self._load(weights)
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Sample. Each draw has a seed that follows from the call; what is computed beside it can move a log-prob by rounding."""
        limits = response_limits(prompts, sampling.max_tokens, self._max_model_len, self._vocab_size)
        with self._lock:
            if sampling.temperature > 0:
                made = self._sampled(prompts, limits, sampling)
            else:
                made = self._api.generate(prompts, limits, sampling.stop_token_ids)
            self._require_label()
        return made

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Teacher-forced log-probs by `prompt_logprobs`."""
        check_sequences(sequences, temperature, self._max_model_len, self._vocab_size)
        with self._lock:
            scores = self._api.score(sequences, temperature)
            self._require_label()
        return scores

    def close(self) -> None:
        """Close the connections and take the files of the updates away."""
        self._http.close()
        while not self._idle.empty():
            self._idle.get().close()
        for path in self._folder.glob(f"{self._token}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _sampled(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], sampling: Sampling) -> list[Generation]:
        # Equal neighbours are draws of one request.
        runs = [(*key, len(list(run))) for key, run in groupby(zip(map(tuple, prompts), limits, strict=True))]
        seeds = np.random.default_rng(sampling.seed).integers(2**62, size=len(runs)).tolist()

        def draw(run: tuple[tuple[int, ...], int, int], seed: int) -> list[Generation]:
            prompt, limit, count = run
            http = self._idle.get()
            try:
                return self._api.sample(http, prompt, count, limit, sampling, seed)
            finally:
                self._idle.put(http)

        with ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="vllm") as threads:
            return [made for several in threads.map(draw, runs, seeds) for made in several]

    def _model(self) -> _Model:
        try:
            models = parsed(_Models, self._http.get("/v1/models"), self.url, "GET /v1/models").data
        except NotFoundError as error:
            raise EngineError(f"{error}. It must be vLLM's OpenAI-compatible server") from None
        if len(models) != 1:
            raise UsageError(f"the server at {self.url} serves {len(models)} models; one that takes updates serves one, without adapters")
        return models[0]

    def _require_start(self, options: VllmOptions, artifact_dir: Path, model: _Model) -> None:
        """Raises `UsageError` with everything in which the server's start differs from what the target says, and the fix of each."""
        try:
            # Collected at the first call by a tool of torch, which takes some seconds.
            info = parsed(_Info, self._http.get("/server_info?config_format=json"), self.url, "GET /server_info")
        except NotFoundError:
            raise UsageError(
                f"the server at {self.url} has no /server_info, so it takes no updates: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment, and let nobody else reach its port (docs/scale.md)"
            ) from None
        started, cache = info.vllm_config.model, info.vllm_config.cache
        quantization = _quantization(artifact_dir)
        # vLLM generates a token also when it only scores, and takes no more than the model says it has positions for unless it is told.
        wanted_len = self._max_model_len + 1
        is_model_limit = read_limits(artifact_dir, wanted_len)[0] < wanted_len
        override = f""" --hf-overrides '{{"max_position_embeddings": {wanted_len}}}'""" if is_model_limit else ""
        num_logprobs = self._vocab_size if self._vocab_size <= options.max_logprobs else 1
        wrong = []
        # vLLM may serve gptq as gptq_marlin.
        if (quantization or "None") not in str(started.quantization):
            wrong.append(f"its weights are in the format {started.quantization}, not {quantization}: start it on an export of this target")
        if started.logprobs_mode != "processed_logprobs":
            wrong.append(f"its log-probs are {started.logprobs_mode}, not those it samples by: --logprobs-mode processed_logprobs")
        if 0 <= started.max_logprobs < num_logprobs:
            wrong.append(f"it gives {started.max_logprobs} log-probs of a token, {num_logprobs} are needed: --max-logprobs {num_logprobs}")
        if model.max_model_len is None or model.max_model_len < wanted_len:
            wrong.append(f"it takes {model.max_model_len} tokens, {wanted_len} are needed: --max-model-len {wanted_len}{override}")
        if started.dtype.removeprefix("torch.") != options.dtype:
            wrong.append(f"it computes in {started.dtype.removeprefix('torch.')}: --dtype {options.dtype}")
        if cache.cache_dtype != options.kv_cache_dtype:
            wrong.append(f"its KV cache is {cache.cache_dtype}: --kv-cache-dtype {options.kv_cache_dtype}")
        if info.vllm_env.cpu_int4_w4a8 not in (None, options.cpu_int4_w4a8):
            wrong.append(f"engine.options.cpu_int4_w4a8 is {options.cpu_int4_w4a8}: VLLM_CPU_INT4_W4A8={int(options.cpu_int4_w4a8)}")
        if wrong:
            raise ListedError(f"the vLLM server at {self.url} was not started for this target:", wrong, f"{_START}, with these")

    def _require_sight(self) -> None:
        """Raises `UsageError` unless the server sees our folder. A reload that fails ends the server; this one loads nothing."""
        name = f"{self._token}-empty"
        self._make(name).write_bytes(_EMPTY)
        try:
            self._reload(name, is_checkpoint_format=False)
        except NotFoundError:
            raise
        except StatusError as error:
            raise UsageError(
                f"the server at {self.url} cannot read {self._folder_there}/{name}, which is {self._folder / name} here. Updates go "
                "through a folder that both machines see: give it as `folder`, and its path there, where it is another, as "
                f"`folder_there`. {error}"
            ) from None
        finally:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _load(self, weights: WeightFile) -> None:
        name = f"{self._token}-{weights.weight_version}-{secrets.token_hex(2)}"
        self._put_label("loading")
        path = self._make(name)
        try:
            os.link(weights.path, path)
        except OSError:  # on another file system
            shutil.copyfile(weights.path, path)
        try:
            self._reload(name)
        except StatusError as error:
            raise EngineError(
                f"the server at {self.url} failed while it loaded {self._folder_there}/{name}, and cannot be trusted any more: start it "
                f"anew, on an export of this very model and target. {error}"
            ) from None
        if not parsed(_Reset, self._http.post("/reset_prefix_cache", {}), self.url, "POST /reset_prefix_cache").success:
            raise EngineError(
                f"the server at {self.url} did not drop its prefix cache, which is of the old weights: it has requests of somebody else. "
                "A server that takes updates serves one run"
            )
        self._put_label(str(weights.weight_version))
        self.weight_version = self._api.weight_version = weights.weight_version
        # The server may still read from the file of the version before, not from older ones.
        if self._served_from:
            shutil.rmtree(self._folder / self._served_from, ignore_errors=True)
        self._served_from = name

    def _reload(self, name: str, *, is_checkpoint_format: bool = True) -> None:
        arguments = {"weights_path": f"{self._folder_there}/{name}", "is_checkpoint_format": is_checkpoint_format}
        self._http.post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})

    def _make(self, name: str) -> Path:
        path = self._folder / name / WEIGHTS_FILE
        path.parent.mkdir(parents=True)
        return path

    def _put_label(self, what: str) -> None:
        self._label = f"hetero-rl {self._token} {what}"
        self._http.post("/update_weight_version", {"new_version": self._label})

    def _require_label(self) -> None:
        """Raises `EngineError` where the server has not kept our label: whatever it answered, it did with weights that are not ours."""
        found = parsed(_WeightInfo, self._http.get("/weight_info"), self.url, "GET /weight_info").weight_version
        if found != self._label:
            raise EngineError(
                f"the server at {self.url} serves other weights than it was given (its label is {found!r}, not {self._label!r}): "
                "it was started anew, or another run took it over"
            )


def _quantization(artifact_dir: Path) -> str | None:
    """The format of the weights by the artifact's own `config.json`, as vLLM names it; None for weights that are not quantized."""
    config: Mapping[str, Mapping[str, str]] = json.loads((artifact_dir / "config.json").read_text("utf-8"))
    return config.get("quantization_config", {}).get("quant_method")


_HEADER = b'{"__metadata__":{"format":"pt"}}'
_EMPTY = len(_HEADER).to_bytes(8, "little") + _HEADER
"""A safetensors file without a tensor."""
