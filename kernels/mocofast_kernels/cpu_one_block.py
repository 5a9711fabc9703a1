"""InfoNCE of small problems on a CPU, without blocks.

One call of the compiled library (`sweep.c`) takes up to PRODUCTS products: PyTorch's two dozen
operators cost a microsecond each, and no thread waits for another. One straight function takes
small problems where the library cannot (docs/log.md).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from mocofast_kernels import cpu_ranks, cpu_sweep, cpu_threads
from mocofast_kernels.cpu_library import addresses, is_watched, takes
from mocofast_kernels.cpu_products import SMALL, Scratch, product, weighted_sums
from mocofast_kernels.cpu_sweep import PRODUCTS
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
CONVERTED = 2**20  # most numbers of negatives of 16 bits, which are copied to float32

_Loss = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *[ctypes.c_void_p] * 4,
    *[ctypes.c_int64] * 3,
    ctypes.c_int,
    ctypes.c_float,
    ctypes.c_int,
    ctypes.c_float,
    *[ctypes.c_void_p] * 3,
)


def compiled_block(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    inverse_t: float,
    normalize_negatives: bool,
    return_rank: bool,
    mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Returns the results of `one_block` by the compiled library, to rounding.

    None for other tensors than contiguous ones of float32, bfloat16 and float16 on a CPU, for many
    numbers, and where the library or its instructions are missing. The choice does not depend on
    the number of threads.
    """
    count, dim = query.shape
    padded = -(-count // cpu_sweep.LANES) * cpu_sweep.LANES
    if padded * negatives.numel() > PRODUCTS or is_watched():
        return None
    if not all(map(takes, (query, positive, negatives))):
        return None
    if negatives.dtype != torch.float32 and negatives.numel() > CONVERTED:
        return None
    compute = _compiled()
    if compute is None:
        return None
    tensors = query.float(), positive.float(), negatives.float()
    loss = tensors[0].new_empty(() if mean else count)
    grad = torch.empty_like(tensors[0])
    rank = equal = None
    if return_rank:
        rank = loss.new_empty(count, dtype=torch.int32)
        if negatives.dtype != torch.float32 and not normalize_negatives:
            equal = cpu_ranks.as_stored(unit_rows(positive, True)[0], negatives, False)
    sizes = count, len(negatives), dim
    options = normalize_negatives, inverse_t, mean, cpu_ranks.tie_share(dim)
    given, outputs = addresses(*tensors, equal), addresses(loss, grad, rank)
    if not compute(*given, *sizes, *options, *outputs):
        raise MemoryError(f"no memory for the gradient of {count} x {dim} numbers")
    return loss, rank, grad.to(gradient_dtype(query.dtype)) if mean else grad


@functools.cache
def _compiled() -> Any:
    return cpu_sweep.wide_function(_Loss, "sweep_whole")


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
        equal = cpu_ranks.as_stored(key, negatives, normalize_negatives)
        rank = Scratch().count_reaching(weights, cpu_ranks.least_tie(scaled, equal))
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
