"""Quantize, publish, prove: the learner's weights become what the engine serves.

The engine's folder is the artifact in the making: engine-native files around one file of weights. A publish writes the
new weights beside the old, swaps them into the running engine, proves that the engine now computes with them, and only
then gives them the old one's name. What was last proven is therefore what lies in the folder (law 1).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy_targets.catalog import open_engine
from deploy_targets.engines.pool import PoolEngine
from deploy_targets.errors import EngineError, ProofError
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import CalibratedQuantizer, Engine, Quantizer
from deploy_targets.types import TokenScores, TokenSequence, WeightFile
from deploy_targets.weights_file import weights_name, write_version
from hetero_rl.learner.deepspeed_learner import Learner, LearnerScores

PROOF_GAP_MIN = 0.02
"""Mean abs(dp) between twin and engine that kernels alone may cause, whatever was measured at the start: a share of the mean probability,
as the differences of a model that is sure of little are small, whatever is wrong with it."""
PROOF_GAP_MAX = 0.15
"""Mean abs(dp) beyond which an engine does not run this model, whatever was measured at the start: a share of the mean of the larger
probability, which bounds what any two models can differ by. FP8 caches, the coarsest of kernels, make 0.05 of it."""
PROOF_GAP_FACTOR = 5.0
"""How far the gap may grow over the one of the freshly built engine before the update counts as failed."""
STALE_MARGIN = 2.0
"""A twin that moved by more than this many kernel gaps must have taken the engine along."""
NEARER = 1.25
"""So many times nearer to the old weights than to the new is what chance does not make of an engine whose kernels' gap has grown."""

NUM_CALIBRATION_SEQUENCES = 64
"""Rollouts that a calibrated quantizer rounds by."""


@dataclass(frozen=True, slots=True)
class PublishStats:
    """Seconds by phase, and the proof's mean abs(p_twin - p_engine)."""

    quantize_s: float
    swap_s: float
    proof_s: float
    proof_gap: float


@dataclass(frozen=True, slots=True)
class ProbeProbabilities:
    """Probabilities of the probe tokens, float32 [num_tokens] each: what the target should answer, and what it answered."""

    twin: NDArray[np.float32]
    engine: NDArray[np.float32]

    @property
    def gap(self) -> float:
        """Mean abs(p_twin - p_engine)."""
        return float(np.abs(self.twin - self.engine).mean())

    @property
    def largest_bound(self) -> float:
        """The gap beyond which this is another model."""
        return PROOF_GAP_MAX * float(np.maximum(self.twin, self.engine).mean())

    def bound(self, reference_gap: float) -> float:
        """The largest gap at which the engine counts as serving these weights, given that of the fresh engine."""
        return min(max(PROOF_GAP_MIN * float(self.twin.mean()), PROOF_GAP_FACTOR * reference_gap), self.largest_bound)


class Publisher:
    """Owns the serving engine and the folder it serves from."""

    def __init__(
        self,
        learner: Learner,
        quantizer: Quantizer,
        profile: TargetProfile,
        model_dir: Path,
        folder: Path,
        weight_version: int = 0,
        calibration: Sequence[TokenSequence] = (),
        start_engine: Callable[[Path, int], Engine] | None = None,
    ) -> None:
        """Quantize the learner's weights as `weight_version` into `folder` and start the engine on them.

        `calibration`: what a calibrated quantizer rounds by, in a run that goes on; a new run has nothing yet. `start_engine` gives
        the engine of (folder, weight_version), unset: that of the profile.
        """
        self._start_engine = start_engine or partial(open_engine, profile)
        self._learner, self._quantizer, self._profile, self.folder = learner, quantizer, profile, folder
        self._calibrated = quantizer if isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_calibration else None
        self.calibration = tuple(calibration)
        self._model_dir, self._weights = model_dir, folder / weights_name(quantizer)
        self._pending, self._proven = (self._weights.with_name(f"{self._weights.name}.{part}") for part in ("next", "proven"))
        self.num_rebuilds = 0
        self.rebuilt_because = ""
        self._probes: list[TokenSequence] = []
        self._reference_gap = 0.0
        self._proof_gap = float("nan")
        self._unanswered: EngineError | None = None
        self._twin: NDArray[np.float32] = np.zeros(0, np.float32)
        self._told_apart: NDArray[np.float32] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob("*.next"), *folder.glob("*.proven"), *folder.glob("*.partial")):
            leftover.unlink()  # of a run that was killed in the middle of a publish
        self._write(self._weights)
        quantizer.scaffold(model_dir, folder)
        self.engine = self._start_engine(folder, weight_version)

    @property
    def proof_gap(self) -> float:
        """Mean abs(p_twin - p_engine) of the last proof."""
        return self._proof_gap

    @property
    def probes(self) -> list[TokenSequence]:
        """The sequences that every update is proven on."""
        return self._probes

    @property
    def awaits_calibration(self) -> bool:
        """Whether the weights are rounded by nothing yet, and should be."""
        return self._calibrated is not None and not self.calibration

    def start_calibrated(self, sequences: Sequence[TokenSequence]) -> None:
        """Serve the weights rounded by `sequences`, as the next version; before anything is measured or proven. Raises `EngineError`."""
        failure, _ = self._swap(self.engine.weight_version + 1, sequences)
        if failure is not None:
            raise EngineError(failure)
        os.replace(self._pending, self._weights)

    def calibrate(self, probes: list[TokenSequence], reference_gap: float | None = None) -> float:
        """Choose the proof's probes; the gap on the freshly built engine is the kernels' own, and the reference of later proofs.

        A resumed run passes the `reference_gap` it was started with. Raises `ProofError` when even the fresh engine does not
        compute what the scheme says: it answers unlike the fake-quantized learner, or rather like the one that is not quantized.
        """
        self._probes = probes
        plain = probabilities(self._learner.score(probes, as_twin=False))

        def judged(measured: ProbeProbabilities) -> str | None:
            reference = measured.gap if reference_gap is None else reference_gap
            return proof_failure(measured, None, reference) or unrounded_failure(measured, plain)

        failure = self._prove(judged)
        self._told_apart = self._twin
        self._reference_gap = self._proof_gap if reference_gap is None else reference_gap
        if failure is not None:
            raise ProofError(
                f"the freshly started engine {self._profile.engine.name!r} does not compute with the published weights: {failure}. "
                f"{self._where_to_look()}"
            )
        return self._reference_gap

    def publish(self, weight_version: int, rollouts: Sequence[TokenSequence] = ()) -> PublishStats:
        """Publish the learner's weights as `weight_version`; on a failed proof rebuild the engine once, then give up.

        A calibrated quantizer rounds them by some of `rollouts`, or by what it had before.

        Raises:
            WeightsError: a tensor holds NaN or infinity; the engine keeps serving the old version.
            ProofError: neither the updated nor the rebuilt engine serves what was published.
            EngineError: no engine could be started anew, or it does not answer.
        """
        start = time.perf_counter()
        failure, quantized = self._swap(weight_version, rollouts)
        swapped = time.perf_counter()
        failure = failure or self._proof_failure()
        if failure is None:
            os.replace(self._pending, self._weights)
        else:
            self._rebuild(weight_version, failure)
        proven = time.perf_counter()
        return PublishStats(quantized - start, swapped - quantized, proven - swapped, self._proof_gap)

    def _swap(self, weight_version: int, rollouts: Sequence[TokenSequence]) -> tuple[str | None, float]:
        """Quantize, and bring the weights into the engine. Returns why that failed, if it did, and when the file was written."""
        if self._calibrated is not None and rollouts:
            self.calibration = tuple(evenly(rollouts, NUM_CALIBRATION_SEQUENCES))
        self._write(self._pending)
        quantized = time.perf_counter()
        failure = None
        try:
            self.engine.update(WeightFile(self._pending, weight_version))
        except EngineError as error:
            failure = str(error)
        return failure, quantized

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _write(self, path: Path) -> None:
        if self._calibrated is not None and self.calibration:
            self._learner.calibrate(self.calibration)
        write_version(
            path, self._quantizer, self._learner.named_tensors(), self._model_dir, num_tensors_max=4 * self._learner.num_tensors + 64
        )

    def _proof_failure(self) -> str | None:
        before = self._told_apart
        failure = self._prove(lambda measured: proof_failure(measured, before, self._reference_gap))
        # What the gap has grown to blurs as much: only a step beyond it tells old weights from new.
        if before is None or moved_apart(self._twin, before, max(self._reference_gap, self._proof_gap)):
            self._told_apart = self._twin
        return failure

    def _prove(self, judge: Callable[[ProbeProbabilities], str | None]) -> str | None:
        """Hold every engine's answers to the probes against the twin's; returns why none is to be trusted, if so."""
        twin = self._twin = probabilities(self._learner.score(self._probes, as_twin=True))
        gaps: list[float] = []
        self._unanswered = None

        def check(engine: Engine) -> str | None:
            try:
                measured = ProbeProbabilities(twin, probabilities(engine.score(self._probes, self._learner.temperature)))
            except EngineError as error:
                self._unanswered = error
                return f"the probes could not be scored: {error}"
            failure = judge(measured)
            if failure is None:
                gaps.append(measured.gap)
            return failure

        failure = self.engine.prove(check) if isinstance(self.engine, PoolEngine) else check(self.engine)
        self._proof_gap = max(gaps, default=float("nan"))
        return failure

    def _rebuild(self, weight_version: int, failure: str) -> None:
        """Start the engine anew on the pending weights; the last proven ones come back into the folder if that fails as well."""
        self.num_rebuilds += 1
        self.rebuilt_because = failure
        self.engine.close()
        os.replace(self._weights, self._proven)
        os.replace(self._pending, self._weights)
        try:
            self.engine = self._start_engine(self.folder, weight_version)
            self._told_apart = None
            again = self._proof_failure()
            if again is not None and self._unanswered is not None:
                raise EngineError(f"update {weight_version} could not be proven: {failure}. A rebuilt engine fails as well: {again}")
            if again is not None:
                raise ProofError(
                    f"update {weight_version} is not served by engine {self._profile.engine.name!r}: {failure}. "
                    f"A rebuilt engine fails as well: {again}. {self._where_to_look()}"
                )
        except BaseException:
            os.replace(self._proven, self._weights)
            raise
        self._proven.unlink()

    def _where_to_look(self) -> str:
        profile = self._profile
        if not self._learner.has_twin:
            return "No layer is quantized, so the engine or its options are at fault; `hetero-rl doctor` shows versions"
        return (
            f"Scheme {profile.scheme.name} or its kernels in {profile.engine.name} are at fault, or engine.options; "
            "`hetero-rl doctor` shows versions, and another engine.process or engine.publish in a profile of your own narrows it down"
        )


def probabilities(scores: Sequence[TokenScores] | Sequence[LearnerScores]) -> NDArray[np.float32]:
    """Of all scored tokens, one after the other."""
    logps: NDArray[np.float32] = np.concatenate([score.logps for score in scores])
    return np.exp(logps)


def proof_failure(now: ProbeProbabilities, before: NDArray[np.float32] | None, reference_gap: float) -> str | None:
    """Why the engine's answers do not prove the update, or None when they do (law 5).

    Two rules, both on abs(dp) between the engine and the fake-quantized learner: the engine must agree with the new weights
    about as well as the fresh engine agreed with its own (`reference_gap`), and when the learner moved far enough to tell,
    it must not agree clearly better (`NEARER`) with those of `before`, the last twin that could be told from the one before it.
    """
    for whose, values in (("the engine's", now.engine), ("the learner's", now.twin)):
        if not np.isfinite(values).all():
            return f"{int((~np.isfinite(values)).sum())} of {whose} {len(values)} probe log-probs are not finite"
    bound = now.bound(reference_gap)
    if now.gap > bound:
        return f"mean abs(dp) to the published weights is {now.gap:.4f} on {len(now.engine)} probe tokens, more than {bound:.4f}"
    if before is not None:
        to_old = float(np.abs(before - now.engine).mean())
        if moved_apart(now.twin, before, reference_gap) and NEARER * to_old < now.gap:
            return f"the engine answers as before the update (abs(dp) {to_old:.4f} to the old weights, {now.gap:.4f} to the new)"
    return None


def unrounded_failure(fresh: ProbeProbabilities, plain: NDArray[np.float32]) -> str | None:
    """Why a fresh engine seems to serve the weights as they were before quantization, or None.

    `plain`: probabilities by the learner's own weights. Said only where the rounding shows beyond what kernels blur.
    """
    rounding, to_plain = float(np.abs(plain - fresh.twin).mean()), float(np.abs(plain - fresh.engine).mean())
    if STALE_MARGIN * to_plain >= fresh.gap or rounding <= PROOF_GAP_MIN * float(fresh.twin.mean()):
        return None
    return (
        f"it answers as if nothing were quantized: mean abs(dp) {to_plain:.4f} to the learner's own weights, {fresh.gap:.4f} to the rounded"
    )


def moved_apart(now: NDArray[np.float32], before: NDArray[np.float32], reference_gap: float) -> bool:
    """Whether two twins differ by more than the kernels blur."""
    return float(np.abs(now - before).mean()) > STALE_MARGIN * reference_gap


def evenly(sequences: Sequence[TokenSequence], count: int) -> Sequence[TokenSequence]:
    """At most `count` of `sequences`, evenly spaced."""
    return [sequences[place * len(sequences) // count] for place in range(count)] if len(sequences) > count else sequences
