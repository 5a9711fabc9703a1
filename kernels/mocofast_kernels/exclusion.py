"""Negatives that a query leaves out: by position, by equal ids, or by a mask."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Exclusion(NamedTuple):
    """Says which negatives j are left out of row i. The rules add up."""

    period: int = 0  # P > 0 leaves out j where j % P == i % P
    query_ids: Tensor | None = None  # (N,) int64: j is left out where the ids are equal
    key_ids: Tensor | None = None  # (K,) int64, None like query_ids
    mask: Tensor | None = None  # (N, K) bool: True leaves j out

    def __bool__(self) -> bool:
        return self.period > 0 or self.query_ids is not None or self.mask is not None

    def fill(self, logits: Tensor, rows: slice, columns: slice) -> None:
        """Writes -inf to the logits (R, B) of what is left out, for a block of rows and columns."""
        if self.period:
            _fill_period(logits, rows.start, columns.start, self.period)
        if self.query_ids is not None and self.key_ids is not None:
            equal = torch.eq(self.query_ids[rows, None], self.key_ids[columns])
            logits.masked_fill_(equal, -math.inf)
        if self.mask is not None:
            logits.masked_fill_(self.mask[rows, columns], -math.inf)


def _fill_period(logits: Tensor, row: int, column: int, period: int) -> None:
    """Writes -inf to logits (R, B) at i, j where (row + i) % period == (column + j) % period."""
    count, width = logits.shape
    first = (row - column) % period - ((count - 1) // period + 1) * period
    for offset in range(first, width, period):
        if offset > -count:
            logits.diagonal(offset).fill_(-math.inf)
