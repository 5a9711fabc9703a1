"""Sums over blocks of negatives by PyTorch's operators, for InfoNCE on a CPU (`cpu`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocofast_kernels.cpu_products import Scratch, weighted_sums
from mocofast_kernels.exclusion import Exclusion


class Sums(NamedTuple):
    """Sums over all negatives for R queries, with weights w = exp2(logit - maximum)."""

    total: Tensor  # (R, 1) sum of w
    output: Tensor | None  # (R, C) sum of w x negative
    maximum: Tensor | None  # (R, 1), or None where nothing is subtracted
    above: Tensor | None  # (R,) int32: logits that reach the positive's logit


def sums_of(
    block: Tensor,
    scaled: Tensor,
    logit_positive: Tensor,
    tie: Tensor | None,
    place: tuple[slice, slice],
    excluded: Exclusion,
    unshifted: bool,
    compute_grad: bool,
    scratch: Scratch,
) -> Sums:
    """Returns the sums over a block of negatives for a block of queries.

    block: (B, C) negatives.
    scaled: (R, C) queries times log2(e) / T, in the dtype of the negatives.
    logit_positive: (R, 1).
    tie: (R, 1), the least logit that ties with the positive's logit. None: count no logits.
    place: the numbers of these queries and negatives among all.
    unshifted: the logits are bounded, so no maximum is subtracted.
    """
    output = maximum = above = None
    logits = scratch.product(scaled, block)  # (R, B)
    if excluded:
        excluded.fill(logits, *place)
    if tie is not None:
        above = scratch.count_reaching(logits, tie)
    if not unshifted:
        maximum = torch.maximum(logit_positive, logits.amax(1, keepdim=True))
        logits.sub_(maximum)
    weights = logits.exp2_()
    total = weights.sum(1, keepdim=True)
    if compute_grad:
        output = weighted_sums(scratch.operand(weights, block.dtype), block)
    return Sums(total, output, maximum, above)


def merged(sums: Sums, part: Sums) -> Sums:
    """Returns the sums over the negatives of `sums` and `part`. Overwrites `sums` and `part`."""
    maximum = None
    if sums.maximum is not None and part.maximum is not None:
        maximum = torch.maximum(sums.maximum, part.maximum)
        _shift(sums, sums.maximum - maximum)
        _shift(part, part.maximum - maximum)
    sums.total.add_(part.total)
    for own, other in ((sums.output, part.output), (sums.above, part.above)):
        if own is not None and other is not None:
            own.add_(other)
    return sums._replace(maximum=maximum)


def _shift(sums: Sums, difference: Tensor) -> None:
    """Multiplies the weights of `sums` by exp2(difference). difference: (R, 1)."""
    factor = torch.exp2(difference)
    sums.total.mul_(factor)
    if sums.output is not None:
        sums.output.mul_(factor)


def joined(blocks: list[Sums]) -> Sums:
    """Returns the sums of all blocks of queries, concatenated."""
    if len(blocks) == 1:
        return blocks[0]
    fields: list[Any] = [None if field[0] is None else torch.cat(field) for field in zip(*blocks)]
    return Sums(*fields)
