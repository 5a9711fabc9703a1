"""Oracle of InfoNCE: the definition in float64, differentiated by PyTorch's autograd.

Kernels and CPU paths are compared with this oracle, which shares no code with the package. The
code is written for clarity: the whole (N, 1 + K) matrix of logits, explicit softmax, no blocking.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)


def _scores(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns similarities before the temperature, (N,) and (N, K), and a mask of negatives."""
    query, positive, negatives = query.double(), positive.double(), negatives.double()
    if normalize:
        query, positive = _unit(query), _unit(positive)
    if normalize_negatives:
        negatives = _unit(negatives)
    similarity_positive = (query * positive).sum(dim=1)
    similarity = query @ negatives.T
    counts = torch.ones_like(similarity, dtype=torch.bool)
    if exclude_period:
        row = torch.arange(similarity.shape[0], device=similarity.device)[:, None]
        column = torch.arange(similarity.shape[1], device=similarity.device)[None, :]
        counts = row % exclude_period != column % exclude_period
    return similarity_positive, similarity, counts


def info_nce_oracle(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    normalize: bool = True,
    normalize_negatives: bool = True,
    exclude_period: int = 0,
) -> Tensor:
    """Returns every row's loss, (N,) float64, -log softmax([s_+; s_j] / T)[0], with a graph.

    query, positive: (N, C), any float dtype, copied to float64.
    negatives: (K, C), any float dtype, copied to float64.
    exclude_period: P > 0 leaves negative j out of row i if j % P == i % P.
    """
    similarity_positive, similarity, counts = _scores(
        query, positive, negatives, normalize, normalize_negatives, exclude_period
    )
    if isinstance(temperature, Tensor):
        temperature = temperature.double()
    # Masked after the division: 0 * inf would make the temperature's gradient NaN.
    negative_logits = (similarity / temperature).masked_fill(~counts, float("-inf"))
    logits = torch.cat([(similarity_positive / temperature)[:, None], negative_logits], dim=1)
    shifted = logits - logits.detach().max(dim=1, keepdim=True).values
    return shifted.exp().sum(dim=1).log() - shifted[:, 0]


def rank_bounds(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    tolerance: float,
    normalize: bool = True,
    normalize_negatives: bool = True,
    exclude_period: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns the smallest and largest positive rank, (N,) int64, that rounding may give.

    Rounding can swap two scores that nearly tie, so tests check ranks against this interval.

    tolerance: error of a score q.x, relative to |q||x|.
    """
    with torch.no_grad():
        similarity_positive, similarity, counts = _scores(
            query, positive, negatives, normalize, normalize_negatives, exclude_period
        )
        length_query, length_positive = query.double().norm(dim=1), positive.double().norm(dim=1)
        if normalize:
            length_query, length_positive = (
                torch.ones_like(length_query),
                torch.ones_like(length_positive),
            )
        length = negatives.double().norm(dim=1)
        if normalize_negatives:
            length = torch.ones_like(length)
        margin = tolerance * length_query[:, None] * (length[None, :] + length_positive[:, None])
        gap = similarity - similarity_positive[:, None]
        low = ((gap > margin) & counts).sum(dim=1)
        high = ((gap > -margin) & counts).sum(dim=1)
        return low, high
