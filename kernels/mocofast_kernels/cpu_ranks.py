"""Ranks of positives: how many negatives score as high as the positive, or higher."""

from __future__ import annotations

import torch
from torch import Tensor

from mocofast_kernels.cpu_vectors import wide

# Scores of equal vectors differ by rounding: up to 2 x 2^-23 of sum_i |q_i k_i| for any C, measured
# with oneDNN's products. A score within twice this of the positive's score ties with it.
TIE = 2.0**-21


def least_tie(query: Tensor, positive: Tensor) -> Tensor:
    """Returns the least score that ties with the positive's score, (N, 1) float32 or float64.

    query, positive: (N, C), operands of the products. Scores are rounded to the operands' dtype.
    """
    terms = wide(query) * wide(positive)
    score = terms.sum(1, keepdim=True)
    tie = TIE * torch.finfo(terms.dtype).eps / torch.finfo(torch.float32).eps
    return wide((score - tie * terms.abs_().sum(1, keepdim=True)).to(query.dtype))


def without_nan(ranks: Tensor, loss: Tensor, negatives: int, exclude_period: int) -> Tensor:
    """Lets all negatives stand above the positive where the loss is NaN.

    ranks: (N,) int32, overwritten: a comparison with NaN counted nobody. loss: (N,).
    negatives: K. exclude_period: P > 0 leaves out one negative of every P. What ids or a mask leave
        out counts.
    """
    return ranks.masked_fill_(loss.isnan(), worst_rank(negatives, exclude_period))


def worst_rank(negatives: int, exclude_period: int) -> int:
    """Returns the number of a query's negatives. Arguments: as for `without_nan`."""
    return negatives - (negatives // exclude_period if exclude_period else 0)
