"""Any engine in a process of its own, so that its threads, affinity and memory are not the learner's.

Parent and child exchange one JSON object per line over a socket pair (wire.py). stdout and stderr of the child go to a log
file whose end is shown when it fails.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from deploy_targets.catalog import open_engine_here
from deploy_targets.engines.environment import child_environment
from deploy_targets.engines.wire import (
    answer_generate,
    answer_score,
    generate_request,
    pack_error,
    score_request,
    unpack_error,
    unpack_generations,
    unpack_scores,
)
from deploy_targets.errors import DeployTargetsError, EngineError
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Engine
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile

_LOG_LINES = 15
_LOG_BYTES = 1 << 16
"""How much of the log's end is read for them: a long run prints gigabytes."""
_CLOSE_TIMEOUT_S = 5.0


class ProcessEngine:
    """An engine behind a socket; the errors of our tree that it raises arrive as the same classes."""

    def __init__(
        self,
        profile: TargetProfile,
        artifact_dir: Path,
        weight_version: int,
        *,
        start_timeout_s: float = 900.0,
        call_timeout_s: float = 3600.0,
    ) -> None:
        """Start the child and wait until it serves.

        Raises what the engine's constructor raises, and `EngineError` when the child cannot be started, dies or takes longer than
        `start_timeout_s`; `call_timeout_s` bounds every later call in the same way.
        """
        self.weight_version = weight_version
        self._name = profile.engine.name
        self._call_timeout_s = call_timeout_s
        self._lock = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="deploy-targets-engine-"))
        self._log = self._folder / "engine.log"
        with contextlib.ExitStack() as undone:
            undone.callback(shutil.rmtree, self._folder, ignore_errors=True)
            ours, theirs = socket.socketpair()
            self._socket = undone.enter_context(ours)
            self._lines = undone.enter_context(ours.makefile("rb"))
            with theirs, open(self._log, "wb") as log:
                self._process = self._start_child(theirs, log, child_environment(profile, os.environ))
            undone.pop_all()  # from here on they are given back by `close`
        self._open = True
        atexit.register(self.close)
        try:
            start = {
                "profile": profile.model_dump(mode="json"),
                "artifact_dir": str(Path(artifact_dir).resolve()),
                "weight_version": weight_version,
            }
            self._ask("start", start, start_timeout_s)
        except BaseException:
            self.close()
            raise

    def _start_child(self, connection: socket.socket, log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "deploy_targets.engines.process", str(connection.fileno())],
                pass_fds=[connection.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(
                f"the process of engine {self._name!r} cannot be started: {error}. Give it memory, or raise ulimit"
            ) from error

    @property
    def pid(self) -> int:
        """The child's process id, which is also that of its process group."""
        return self._process.pid

    def update(self, weights: WeightFile) -> int:
        """Have the child's engine load the file."""
        self.weight_version = int(self._call("update", {"path": str(weights.path.resolve()), "weight_version": weights.weight_version}))
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Have the child's engine sample."""
        return unpack_generations(self._call("generate", generate_request(prompts, sampling)), prompts)

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Have the child's engine score."""
        return unpack_scores(self._call("score", score_request(sequences, temperature)))

    def close(self) -> None:
        """End the child and everything it started: politely at first, by force after a few seconds."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        # The child leaves its loop at the end of the stream.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, call: str, arguments: Mapping[str, Any]) -> Any:
        if not self._open:
            raise EngineError(f"this {self._name} engine is closed")
        return self._ask(call, arguments, self._call_timeout_s)

    def _ask(self, call: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        with self._lock:
            self._socket.settimeout(timeout_s)
            try:
                self._socket.sendall(json.dumps({"call": call, **arguments}).encode() + b"\n")
                line = self._lines.readline()
            except TimeoutError:
                failure = self._failure(f"did not answer {call!r} within {timeout_s:g} s")
                self.close()
                raise failure from None
            except BrokenPipeError:
                line = b""
            except ConnectionResetError:
                line = b""
            except BaseException:
                # Interrupted between a question and its answer: the next answer would be that of another question.
                self.close()
                raise
        if not line.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_TIMEOUT_S)
            failure = self._failure(f"died during {call!r} ({_describe_exit(self._process.returncode)})")
            self.close()
            raise failure
        answer = json.loads(line)
        if "error" in answer:
            raise self._rebuild(answer["error"], call)
        return answer["result"]

    def _rebuild(self, error: Mapping[str, Any], call: str) -> DeployTargetsError:
        rebuilt = unpack_error(error)
        if rebuilt is None:
            return self._failure(f"raised {error['class']} in {call!r}: {error['message']}")
        if type(rebuilt) is EngineError:
            rebuilt.args = (error["message"] + self._log_tail(),)
        return rebuilt

    def _failure(self, what: str) -> EngineError:
        return EngineError(f"the process of engine {self._name!r} {what}.{self._log_tail()}")

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            with open(self._log, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
                lines = log.read().decode("utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            if lines:
                return "\nIts last lines:\n" + "\n".join(f"  {line}" for line in lines)
        return " It printed nothing."


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "still running, but silent"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(connection: socket.socket) -> None:
    """The child's loop: the first call opens the engine, the end of the stream closes it."""
    engine: Engine | None = None
    with connection.makefile("rb") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                if request["call"] == "start":
                    profile = TargetProfile.model_validate(request["profile"])
                    engine = open_engine_here(profile, Path(request["artifact_dir"]), request["weight_version"])
                    answer: dict[str, Any] = {"result": None}
                else:
                    assert engine is not None, "the first call opens the engine"
                    answer = {"result": _answer(engine, request)}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": pack_error(error)}
            connection.sendall(json.dumps(answer).encode() + b"\n")
    if engine is not None:
        engine.close()


def _answer(engine: Engine, request: Mapping[str, Any]) -> Any:
    if request["call"] == "update":
        return engine.update(WeightFile(Path(request["path"]), request["weight_version"]))
    return (answer_generate if request["call"] == "generate" else answer_score)(engine, request)


def _die_with_parent(connection: socket.socket) -> None:
    """Kill this process group once the parent's end of the socket is gone and the main thread did not notice.

    PR_SET_PDEATHSIG would kill the child as soon as the *thread* that started it ends
    (https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html), so the socket is watched instead.
    """
    poll = select.poll()
    poll.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
    poll.poll()
    time.sleep(_CLOSE_TIMEOUT_S)
    os.killpg(0, signal.SIGKILL)


def _main() -> None:
    # Ctrl-C reaches the parent, which closes the child in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_die_with_parent, args=[connection], daemon=True).start()
    _serve(connection)
    sys.stdout.flush()
    # Not sys.exit: interpreters with runtime threads of vLLM or onnxruntime may crash or hang while they unload.
    os._exit(0)


if __name__ == "__main__":
    _main()
