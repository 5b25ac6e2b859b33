"""A plug-in whose engine is ONNX Runtime with one fault: `ENGINE_FAULT=CALL:N:KIND` does KIND in the call N (from 0) of `generate`,
`score` or `update`; without it, nothing. `ENGINE_FAULT_CLAIM=FILE`: only in the process that makes the file, of several. The kind `gone`
makes the file `ENGINE_GONE`, and no engine starts while it is there.
"""

from __future__ import annotations

from pathlib import Path

from tests.plugins import lay_out, python_path

MODULE = """
import os, random, signal, threading, time
from dataclasses import replace
import numpy as np
from deploy_targets.engines.onnxruntime import OnnxRuntimeEngine
from deploy_targets.errors import EngineError


class FaultyEngine(OnnxRuntimeEngine):
    def __init__(self, artifact_dir, options, weight_version):
        if os.path.exists(os.environ.get("ENGINE_GONE", "")):
            raise EngineError("its machine is gone")
        super().__init__(artifact_dir, options, weight_version)
        self._fault, self._counts, self._seconds = None, {}, {}
        if "ENGINE_FAULT" in os.environ:
            call, nth, kind = os.environ["ENGINE_FAULT"].split(":")
            self._fault = call, int(nth), kind
        claim = os.environ.get("ENGINE_FAULT_CLAIM")
        if claim and self._fault:
            try:
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                self._fault = None

    def _kind(self, call):
        nth = self._counts[call] = self._counts.get(call, -1) + 1
        if self._fault is None or self._fault[0] != call:
            return None
        if self._fault[2] in ("killed", "hangs", "raises"):
            return self._fault[2] if nth == self._fault[1] else None
        return self._fault[2] if nth >= self._fault[1] else None

    def _call(self, call, do):
        kind = self._kind(call)
        if kind == "killed":
            delay = random.uniform(0, self._seconds.get(call, 0.0))
            threading.Timer(delay, os.kill, [os.getpid(), signal.SIGKILL]).start()
        if kind == "hangs":
            time.sleep(10_000)
        if kind == "gone":
            open(os.environ["ENGINE_GONE"], "w").close()
            raise EngineError("its machine is gone")
        if kind == "raises":
            raise RuntimeError("a bug of the runtime")
        begin = time.monotonic()
        answer = do()
        self._seconds[call] = time.monotonic() - begin
        if kind == "killed":
            time.sleep(60)
        return answer if kind is None else changed(answer, kind, self)

    def update(self, weights):
        return self._call("update", lambda: super(FaultyEngine, self).update(weights))

    def generate(self, prompts, sampling):
        return self._call("generate", lambda: super(FaultyEngine, self).generate(prompts, sampling))

    def score(self, sequences, temperature=1.0):
        return self._call("score", lambda: super(FaultyEngine, self).score(sequences, temperature))


def changed(answer, kind, engine):
    if isinstance(answer, int):
        return answer + 1 if kind == "version" else answer
    if kind == "too_few":
        return answer[1:]
    if kind == "too_many":
        return [*answer, answer[0]]
    return [lie(item, kind, engine) if index % 3 == 0 else item for index, item in enumerate(answer)]


def lie(item, kind, engine):
    if kind == "nan":
        return replace(item, logps=np.full_like(item.logps, np.nan))
    if kind == "positive":
        return replace(item, logps=np.full_like(item.logps, 1.0))
    if kind == "version":
        return replace(item, weight_version=item.weight_version + 1)
    if kind == "short_logps":
        return replace(item, logps=item.logps[:-1])
    if kind == "empty":
        return replace(item, tokens=item.tokens[:0], logps=item.logps[:0])
    if kind == "too_long":
        return replace(item, tokens=np.tile(item.tokens, 20), logps=np.tile(item.logps, 20))
    if kind == "unknown_ids":
        return replace(item, tokens=item.tokens + 1_000_000)
    if kind == "negative_ids":
        return replace(item, tokens=-1 - item.tokens)
    if kind == "other_ids":
        return replace(item, tokens=(item.tokens + 1) % 20)
    if kind == "other_prompt":
        return replace(item, prompt=(*item.prompt, 3))
    if kind == "temperature":
        return replace(item, temperature=item.temperature + 0.5)
    raise AssertionError(kind)
"""
PROFILE = 'name = "faulty"\ndescription = "int4-onnx with a fault"\nextends = "int4-onnx"\nengine.name = "faulty"\nengine.process = "own"\n'


def faulty_target(folder: Path) -> tuple[Path, dict[str, str]]:
    """(profile, environment in which its engine is found)."""
    site = lay_out(folder / "site", "faulty", {"faulty_engine.py": MODULE}, engines="faulty = faulty_engine:FaultyEngine")
    (folder / "faulty.toml").write_text(PROFILE)
    return folder / "faulty.toml", {"PYTHONPATH": python_path(site)}
