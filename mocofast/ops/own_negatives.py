"""InfoNCE where every query has negatives of its own: batched products, differentiated by PyTorch.

The logits have a C-th of the size of the negatives, so nothing is gained by blocks.
"""

from __future__ import annotations

import torch
from mocofast_kernels.cpu_ranks import least_tie
from mocofast_kernels.cpu_vectors import EPS, softplus, wide
from torch import Tensor
from torch.nn import functional as F

from mocofast.ops.sweep import without_autocast


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    ids: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    return_rank: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns losses and positive ranks, (N,), or (N, L) of dense queries. The rank may be None.

    query, positive: (N, C) or (N, L, C).
    negatives: (N, M, C).
    ids: of the queries, (N,) or (N, L), and of the negatives, (N, M). Equal ids are left out.
    mask: bool, (N, M) or (N, L, M). True is left out.
    Further arguments: as for `mocofast.ops.info_nce`, checked.
    """
    rows = query.shape[:-1]
    with without_autocast(query.device.type):
        q, k = (wide(x).reshape(len(x), -1, x.shape[-1]) for x in (query, positive))  # (N, L, C)
        n = wide(negatives)
        if normalize:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ n.mT  # (N, L, M)
        if normalize_negatives:  # divides the scores: a normalised copy would be kept for backward
            norms = torch.linalg.vector_norm(n, dim=-1).clamp_min(EPS)
            scores = scores / norms[:, None]
        left_out = None if mask is None else mask.reshape(scores.shape)
        if ids is not None:
            equal = ids[0].view(len(q), -1, 1) == ids[1][:, None]
            left_out = equal if left_out is None else left_out | equal
        # Loss = softplus(log-sum-exp over the negatives - positive logit), as in the kernels.
        logits = scores / temperature
        if left_out is not None:  # after the division: 0 * inf in the temperature's gradient is NaN
            logits = logits.masked_fill(left_out, -torch.inf)
        difference = logits.logsumexp(-1) - (q * k).sum(-1) / temperature
        loss = softplus(difference).view(rows)
    if not return_rank:
        return loss, None
    with torch.no_grad():
        tie = least_tie(q.flatten(0, 1), k.flatten(0, 1)).view(len(q), -1, 1)
        reached = scores >= tie
        if left_out is not None:
            reached &= ~left_out
        rank = reached.sum(-1).view(rows)
        return loss, rank.masked_fill_(loss.isnan(), scores.shape[-1]).int()
