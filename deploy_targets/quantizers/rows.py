"""Matrices some rows at a time: what an elementwise formula needs in between then stays in the caches of a core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_VALUES_AT_ONCE = 1 << 18


def rows_in_caches(matrix: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of `matrix` that follow one another, each of a quarter of a million values or of one row."""
    num_rows = max(1, _VALUES_AT_ONCE // max(1, matrix[0].numel())) if len(matrix) else 1
    for start in range(0, len(matrix), num_rows):
        yield slice(start, start + num_rows)
