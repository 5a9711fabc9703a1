"""Ranks of positives: how many negatives score as high as the positive, or higher."""

from __future__ import annotations

import torch
from torch import Tensor

from mocofast_kernels.cpu_vectors import wide


def tie_share(dim: int) -> float:
    """Returns the share of sum_i |q_i k_i| that float32 scores of equal vectors differ by at most.

    dim: C. A sum of C products, one after another, is off by at most C / 2 units in the last place
    of the sum of sizes (Higham 2002, eq. 3.5). Equal numbers come to a quarter of it, because every
    addition rounds the same way. The rest of the share is for norms and the second score.
    """
    return (dim + 8) * 2.0**-24


def least_tie(query: Tensor, positive: Tensor) -> Tensor:
    """Returns the least score that ties with the positive's score, (N, 1) float32 or float64.

    query, positive: (N, C), operands of the products. Scores are rounded to the operands' dtype.
    """
    terms = wide(query) * wide(positive)
    score = terms.sum(1, keepdim=True)
    tie = tie_share(terms.shape[1]) * torch.finfo(terms.dtype).eps / torch.finfo(torch.float32).eps
    return wide((score - tie * terms.abs_().sum(1, keepdim=True)).to(query.dtype))


def as_stored(keys: Tensor, negatives: Tensor, normalize_negatives: bool) -> Tensor:
    """Returns unit vectors as the negatives would hold them: a queue of 16 bits rounds its keys.

    normalize_negatives: the negatives are normalised when they are read, and not rounded before.
    """
    return keys if normalize_negatives else wide(keys.to(negatives.dtype))


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
