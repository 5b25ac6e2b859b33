"""Gaps from probabilities, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploy_targets.gap import Gap

Numbers = Sequence[float] | np.ndarray


def make_gap(
    learner_p: Numbers,
    engine_p: Numbers,
    *,
    num_sequences: int = 10,
    agrees: Numbers | None = None,
    nonfinite: Sequence[int] = (0,),
    fp32_p: Numbers | None = None,
    entropy: Numbers | None = None,
) -> Gap:
    """Tokens of the given probabilities in `num_sequences` sequences of equal length; `nonfinite` more in the first, the second, ..."""
    count = len(learner_p)
    per_sequence = -(-count // num_sequences)
    dropped = np.zeros(num_sequences, int)
    dropped[: len(nonfinite)] = nonfinite
    sequence = np.arange(count) // per_sequence
    return Gap(
        learner_logps=np.log(np.asarray(learner_p, float)),
        engine_logps=np.log(np.asarray(engine_p, float)),
        greedy_agrees=np.ones(count, bool) if agrees is None else np.asarray(agrees, bool),
        token_ids=np.zeros(count, np.int32),
        sequence=sequence,
        position=np.arange(count) % per_sequence,
        nonfinite=dropped,
        scored=np.bincount(sequence, minlength=num_sequences) + dropped,
        fp32_logps=None if fp32_p is None else np.log(np.asarray(fp32_p, float)),
        entropy=None if entropy is None else np.asarray(entropy, float),
    )


def empty_gap(num_nonfinite: int) -> Gap:
    """Probes of which no token has a finite engine log-prob."""
    nothing = np.empty(0)
    ints = np.empty(0, int)
    return Gap(nothing, nothing, np.empty(0, bool), np.empty(0, np.int32), ints, ints, np.array([num_nonfinite]), np.array([num_nonfinite]))
