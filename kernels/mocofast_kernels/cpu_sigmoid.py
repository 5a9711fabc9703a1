"""The negatives' part of the sigmoid loss in PyTorch's operators, blocked, for every device.

SigLIP (Zhai et al. 2023, arXiv:2303.15343, eq. 1) sums log(1 + exp(t s_ij + b)) over the negatives
j of row i. With p_ij = 1 / (1 + exp(-(t s_ij + b))) the gradient by row i is t sum_j p_ij n_j, by
negative j it is t sum_i g_i p_ij q_i, where g_i is the incoming gradient of row i.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mocofast_kernels import cpu_threads
from mocofast_kernels.cpu import Blocks, is_small, products
from mocofast_kernels.cpu_products import Scratch, weighted_sums
from mocofast_kernels.cpu_vectors import softplus, wide
from mocofast_kernels.exclusion import Exclusion


class SigmoidForward(NamedTuple):
    """Sums over the negatives of every row, float32 or float64."""

    loss: Tensor  # (N,) sum of log(1 + exp(t s + b))
    weight: Tensor  # (N,) sum of p: the gradient by b
    output: Tensor  # (N, C) sum of p x negative. Times t: the gradient by the row


@cpu_threads.one_fork(unless=is_small, products=products)
def sigmoid_forward(
    query: Tensor, bias: Tensor, negatives: Tensor, scale: Tensor, excluded: Exclusion
) -> SigmoidForward:
    """Returns the sums over all negatives that are not excluded.

    query: (N, C), negatives: (K, C), float32, bfloat16 or float16, or all float64.
    scale: t, and bias: b, both () on the device. They are not read by the host.
    """
    scaled = wide(query) * scale.to(wide(query[:0]).dtype)
    blocks = Blocks(negatives, False, len(query), scaled.dtype)
    scratch = Scratch()
    sums: dict[int, SigmoidForward] = {}  # first row: sums of the rows over the merged blocks

    def compute(block: tuple[slice, slice]) -> SigmoidForward:
        rows, columns = block
        keys = blocks[columns]
        logits = scratch.product(scaled[rows], keys).add_(bias)  # (R, B)
        if excluded:
            excluded.fill(logits, rows, columns)
        loss = softplus(logits).sum(1)
        weights = logits.sigmoid_()
        return SigmoidForward(loss, weights.sum(1), weighted_sums(weights, keys))

    def merge(block: tuple[slice, slice], part: SigmoidForward) -> None:
        first = block[0].start
        known = sums.get(first)
        if known is not None:
            part = SigmoidForward(*(a.add_(b) for a, b in zip(known, part)))
        sums[first] = part

    cpu_threads.in_order(compute, [(r, c) for r in blocks.rows for c in blocks.columns], merge)
    return SigmoidForward(*map(torch.cat, zip(*sums.values())))


@cpu_threads.one_fork(unless=is_small, products=products)
def sigmoid_grad_negatives(
    query: Tensor,
    bias: Tensor,
    negatives: Tensor,
    scale: Tensor,
    excluded: Exclusion,
    grad_loss: Tensor,
) -> Tensor:
    """Returns the gradient by the negatives, (K, C) float32 or float64.

    grad_loss: (N,), incoming gradients of the rows. Further arguments: as for `sigmoid_forward`.
    """
    scaled = wide(query) * scale.to(wide(query[:0]).dtype)
    factors = scaled * grad_loss[:, None]
    blocks = Blocks(negatives, False, len(query), scaled.dtype)
    result = torch.zeros(negatives.shape, dtype=scaled.dtype, device=scaled.device)
    scratch = Scratch()

    def compute(columns: slice) -> None:
        block, part = blocks[columns], result[columns]
        for rows in blocks.rows:
            logits = scratch.product(block, scaled[rows]).add_(bias)  # transposed, (B, R)
            if excluded:
                excluded.fill(logits.t(), rows, columns)
            part.add_(weighted_sums(logits.sigmoid_(), factors[rows]))

    cpu_threads.in_order(compute, blocks.columns, lambda columns, part: None)
    return result
