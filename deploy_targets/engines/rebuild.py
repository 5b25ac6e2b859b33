"""Publishing by a new engine, for runtimes that cannot swap weights while they run (`engine.publish = "rebuild"`)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy_targets.engines.requests import check_layout, folder_layout
from deploy_targets.errors import EngineError
from deploy_targets.protocols import Engine
from deploy_targets.types import WEIGHTS_FILE, Generation, Sampling, TokenScores, TokenSequence, WeightFile
from deploy_targets.weights_file import WEIGHTS_FILES

Open = Callable[[Path, int], Engine]
"""(folder in the engine's native format, weight_version) -> a running engine."""


class RebuildingEngine:
    """An engine that is closed and started anew with each version of the weights."""

    def __init__(self, open_engine: Open, artifact_dir: Path, weight_version: int) -> None:
        """Start the first one. Raises what `open_engine` raises."""
        self._open_engine, self._artifact_dir = open_engine, artifact_dir
        self._weights = next(
            (artifact_dir / name for name in WEIGHTS_FILES if (artifact_dir / name).is_file()), artifact_dir / WEIGHTS_FILE
        )
        # A format of its own is checked by the engine that opens it.
        self._layout = folder_layout(artifact_dir) if self._weights.name == WEIGHTS_FILE else None
        self._engine: Engine | None = open_engine(artifact_dir, weight_version)
        self.weight_version = weight_version

    def update(self, weights: WeightFile) -> int:
        """Close the engine, which makes room for the next one, and start it on the folder with the new weights in place of the old.

        Raises `EngineError` for a file that does not fit, which changes nothing, and whatever the new engine raises,
        after which there is none.
        """
        self._running()
        if self._layout is not None:
            check_layout(self._layout, weights.path)
        self.close()
        with tempfile.TemporaryDirectory(prefix="deploy-targets-rebuild-") as folder:
            for file in self._artifact_dir.iterdir():
                target = weights.path if file.name == self._weights.name else file
                os.symlink(target.resolve(), Path(folder) / file.name)
            self._engine = self._open_engine(Path(folder), weights.weight_version)
        self.weight_version = weights.weight_version
        return self.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """See `Engine.generate`."""
        return self._running().generate(prompts, sampling)

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """See `Engine.score`."""
        return self._running().score(sequences, temperature)

    def _running(self) -> Engine:
        if self._engine is None:
            raise EngineError("this engine is closed")
        return self._engine

    def close(self) -> None:
        """Close the engine that runs."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
