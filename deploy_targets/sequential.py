"""Measure in chunks, and stop when the verdict is clear.

The rule. Chunks are cut from a random order that depends on the number of sequences alone. After 1/8, 1/4 and 1/2 of them (where that is at
least 32 sequences) there is a look, with intervals of `LOOK_CONFIDENCE`:

    probes         stop on fail: the whole interval of a gate lies beyond its fail bound
    task sample    stop on fail, likewise; stop on pass or warn: the whole interval of the accuracy lies within one level

Whatever was measured in the end is judged by the 95 % intervals, which lie within those of the looks. The probes never stop on pass: they
are the cheap part, and a fault of few tokens (two ids swapped, a position beyond the cache) shows in no interval of those not yet replayed.

Error rate, of each gate, at a truth that lies on the bound itself; elsewhere it is lower. By Bonferroni over the three looks, a false
early stop has a probability of `LOOK_ERROR` = 0.5 % on either side of the truth; the 95 % interval at the end adds its 2.5 %. Bootstrap
intervals are approximate, so what the rule promises is `FALSE_FAILS` = 4 % for a fail at the fail bound, early or at the end, and
`FALSE_STOPS` = 1 % for an early stop on a better level than the truth's. tests/unit/deploy_targets/test_sequential.py simulates both.
Strict looks before one at the usual level are Haybittle and Peto's (https://doi.org/10.1038/bjc.1976.220).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploy_targets.gates import Gate

LOOKS = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the sequences after which there is a look."""
LEAST_SEQUENCES = 32
"""No look before so many: the intervals of fewer are too rough."""
LOOK_ERROR = 0.005
"""Probability of a false stop on either side, all looks together."""
FALSE_FAILS, FALSE_STOPS = 0.04, 0.01
"""What the rule promises, see above."""
LOOK_CONFIDENCE = 1 - 2 * LOOK_ERROR / len(LOOKS)


def chunks(num_sequences: int, *, full: bool) -> list[list[int]]:
    """The indices of all sequences in the chunks they are measured in, each in rising order; one chunk where there is no look."""
    ends = [] if full else [end for share in LOOKS if (end := int(num_sequences * share)) >= LEAST_SEQUENCES]
    order = np.random.default_rng(0).permutation(num_sequences)
    return [sorted(part.tolist()) for part in np.split(order, ends) if len(part)]


def may_fail(gates: Sequence[Gate]) -> bool:
    """Whether one of `gates` has its value beyond its fail bound: without that, no interval of theirs is worth its time at a look."""
    return any(gate.value is not None and gate.level(gate.value) == "fail" for gate in gates)


def fails_clearly(gates: Sequence[Gate]) -> bool:
    """Whether one of `gates`, judged with `LOOK_CONFIDENCE`, lies beyond its fail bound with its whole interval."""
    return any(gate.verdict == "fail" and gate.settled_level == "fail" for gate in gates)


def accuracy_is_settled(gates: Sequence[Gate]) -> bool:
    """Whether the gate on the accuracy, judged with `LOOK_CONFIDENCE`, lies within one level with its whole interval."""
    return any(gate.name == "accuracy_drop" and gate.verdict != "undecided" and gate.settled_level is not None for gate in gates)
