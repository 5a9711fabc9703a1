"""InfoNCE of small problems on a CPU: one straight function, without blocks.

At 16 x 256 x 64 a third of the time went into calls between the operations (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mocofast_kernels import cpu_ranks, cpu_threads
from mocofast_kernels.cpu_products import SMALL, Scratch, product, weighted_sums
from mocofast_kernels.cpu_vectors import (
    LOG2E,
    clamped_norm,
    gradient_dtype,
    softplus,
    through_normalize,
    unit_rows,
)

ROWS = 512  # most queries
NUMBERS = 2**17  # most logits, and most numbers of the negatives


def is_one_block(query: Tensor, negatives: Tensor) -> bool:
    """Says whether a problem is small enough, and is computed by one thread."""
    count, dim = query.shape
    return (
        count <= ROWS
        and len(negatives) * max(count, dim) <= NUMBERS
        and (cpu_threads.count() == 1 or count * negatives.numel() <= SMALL)
    )


def one_block(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    inverse_t: float,
    normalize_negatives: bool,
    return_rank: bool,
    mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns loss, rank and gradient of the query of `cpu.infonce_forward`, to the bit.

    Serves MoCo: unit vectors, logits without a shift, products in float32, all negatives, and
    the gradient of the query alone.
    """
    dtype = query.dtype
    h, norm = unit_rows(query, True)
    key, _ = unit_rows(positive, True)
    block = negatives.float()
    scaled = h * (inverse_t * LOG2E)
    logit_positive = (scaled * key).sum(1, keepdim=True)
    if normalize_negatives:
        block = block / clamped_norm(block)
    weights = product(scaled, block)  # logits
    rank = None
    if return_rank:
        rank = Scratch().count_reaching(weights, cpu_ranks.least_tie(scaled, key))
    weights.exp2_()
    total = weights.sum(1, keepdim=True)
    output = weighted_sums(weights, block)
    difference = total.log().sub_(logit_positive, alpha=1 / LOG2E)
    loss = softplus(difference)
    if rank is not None:
        cpu_ranks.without_nan(rank, loss.squeeze(1), len(negatives), 0)
    weight = torch.sigmoid(difference).mul_(-inverse_t / (len(h) if mean else 1))
    grad = torch.addcdiv(key, output, total, value=-1).mul_(weight)
    grad = through_normalize(grad, (grad * h).sum(1, keepdim=True), h, norm)
    if mean:
        return loss.mean(), rank, grad.to(gradient_dtype(dtype))
    return loss.squeeze(1), rank, grad
