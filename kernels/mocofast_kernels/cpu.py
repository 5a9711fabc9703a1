"""The kernels in plain PyTorch: blocked InfoNCE, EMA and enqueue, for the CPU and for any device without Triton.

One pass over the negatives gives the loss and its gradient, as attention whose keys and values are both the queue
(He et al. 2020, arXiv:1911.05722, eq. 1, differentiated). With unit vectors h = query / |query|, k+ the positive,
n_j the negatives, s_j = h.n_j and a = log-sum-exp over the negatives of s_j / T:

    d = a - s_+ / T,    loss = softplus(d),    w = sigmoid(d)  (the negatives' share of the softmax)
    dL/dh = w (O - k+) / T  with  O = sum_j softmax_j(s / T) n_j,    dL/d(1/T) = h . w (O - k+)

Writing the positive apart from the negatives loses no digits when it dominates (loss near 0).

What made it fast on the CPU, in order of effect: no N x K array (a block of logits stays in the cache and is
overwritten by its exponentials), `exp2` instead of `exp` (PyTorch's is four times as fast in float32; log2(e) / T is
folded into the query), parts of a block that fit a core's own cache, no maximum and no shift where the logits are
bounded, and for small problems few operations. docs/log.md has the numbers.

Everything is computed in float32 whatever `dot_dtype` asks: bfloat16 products are hundreds of times slower on CPUs
without the instructions for them. Runs are bit-equal on one machine with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # below this norm a vector is divided by EPS instead, as torch.nn.functional.normalize does
LOG2E = 1.0 / math.log(2.0)
# Largest 1/T whose exponentials need no shift: K exp(1/T) and exp(-1/T) stay normal float32 numbers.
UNSHIFTED_MAX_INVERSE_TEMPERATURE = 60.0
ROWS = 256  # queries per block
PART = 768  # negatives per part of a block: their logits, 768 KB, stay in the L2 cache of the core that works on them
MAX_PARTS = 16  # per block


class InfoNCEForward(NamedTuple):
    """What one pass yields; fields that were not asked for may be None."""

    loss: Tensor  # (N,) float32
    lse: Tensor | None  # (N,) float32: log-sum-exp over the positive and the negatives of s / T
    rank: Tensor | None  # (N,) int32: negatives that score above the positive
    grad_query: Tensor | None  # (N, C) float32: d loss_i / d query_i
    grad_positive: Tensor | None  # (N, C) float32: d loss_i / d positive_i, through the positive logit only
    grad_scale: Tensor | None  # (N,) float32: d loss_i / d (1/T)


def infonce_forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
    return_rank: bool,
    compute_grad: bool,
    only_query: bool,
    dot_dtype: torch.dtype,
) -> InfoNCEForward:
    """Per-row InfoNCE loss and its gradients, in one sweep over the negatives.

    query, positive: (N, C); negatives: (K, C); any strides, float32, bfloat16 or float16. temperature: float, or a
    0-d tensor. normalize, normalize_negatives: divide by the L2 norm over C first. exclude_period P > 0: negative j
    is left out of row i where j % P == i % P. compute_grad: whether gradients are wanted; only_query: that of the
    query alone. dot_dtype is ignored here (float32 always).
    """
    inverse_t = _inverse(temperature)
    unshifted = normalize and isinstance(inverse_t, float) and inverse_t <= UNSHIFTED_MAX_INVERSE_TEMPERATURE
    h, query_norm = _rows(query, normalize)
    key, key_norm = _rows(positive, normalize)
    scaled = h * (inverse_t * LOG2E)  # logits are in units of log 2
    logit_positive = (scaled * key).sum(1, keepdim=True)
    sweep = _Sweep(negatives, normalize_negatives, len(h))
    total, output, maximum, rank = _joined(
        [
            _sums(
                sweep,
                scaled[rows],
                logit_positive[rows],
                rows.start,
                exclude_period,
                unshifted,
                return_rank,
                compute_grad,
            )
            for rows in _ranges(len(h), sweep.rows)
        ]
    )

    # log(0) = -inf where no negative counts: loss 0.
    difference = total.log2().sub_(logit_positive)
    if maximum is not None:
        difference += maximum
    difference.div_(LOG2E)
    loss = torch.nn.functional.softplus(difference)
    lse = None if only_query else torch.add(loss, logit_positive, alpha=1 / LOG2E).squeeze(1)
    if output is None:
        return InfoNCEForward(loss.squeeze(1), lse, rank, None, None, None)
    if exclude_period or maximum is not None:  # 0 / 0 where no negative counts; the clamp lets NaN through
        total.clamp_min_(torch.finfo(torch.float32).tiny)
    weight = torch.sigmoid(difference).mul_(-inverse_t)
    grad = torch.addcdiv(key, output, total, value=-1).mul_(weight)
    along = (grad * h).sum(1, keepdim=True)
    grad_positive = grad_scale = None
    if not only_query:
        grad_scale = (along / inverse_t).squeeze(1)
        grad_key = h * weight
        grad_positive = _through_normalize(grad_key, (grad_key * key).sum(1, keepdim=True), key, key_norm)
    grad_query = _through_normalize(grad, along, h, query_norm)
    return InfoNCEForward(loss.squeeze(1), lse, rank, grad_query, grad_positive, grad_scale)


class _Sums(NamedTuple):
    """Over all negatives, for R queries, with w = exp2(logit - maximum)."""

    total: Tensor  # sum of w, (R, 1)
    output: Tensor | None  # sum of w negative, (R, C)
    maximum: Tensor | None  # (R, 1); None where nothing is subtracted
    above: Tensor | None  # how many logits exceed the positive's, (R,) int32


def _sums(
    sweep: _Sweep,
    scaled: Tensor,
    logit_positive: Tensor,
    first: int,
    exclude_period: int,
    unshifted: bool,
    return_rank: bool,
    compute_grad: bool,
) -> _Sums:
    """For one block of queries, the first of them query number `first`. What is added up over the blocks of negatives
    starts with the first block: few operations, which is what small problems take."""
    total = output = top = above = None
    for start, block, logits in sweep.blocks(scaled):
        parts = slice(len(block))  # all, or one in a last block that does not divide
        if exclude_period:
            _fill_excluded(logits, first, start, exclude_period)
        if return_rank:
            # Comparing into float32 is several times as fast as into booleans; exact, as a block has < 2**24.
            wins = torch.gt(logits, logit_positive, out=sweep.like(logits)).sum((0, 2)).int()
            above = wins if above is None else above.add_(wins)
        if not unshifted:
            floor = logit_positive if top is None else top[parts]
            new_top = torch.maximum(floor, logits.amax(2, keepdim=True))
            logits.sub_(new_top)
            if top is None:
                top = new_top
            elif total is not None:
                rescale = torch.exp2(floor - new_top)
                top[parts] = new_top
                total[parts].mul_(rescale)
                if output is not None:
                    output[parts].mul_(rescale)
        weights = logits.exp2_()
        sums = weights.sum(2, keepdim=True)
        if total is None:
            total = sums
            output = torch.bmm(weights, block) if compute_grad else None
        else:
            total[parts].add_(sums)
            if output is not None:
                output[parts].baddbmm_(weights, block)
    assert total is not None  # there is a negative
    maximum = None
    if top is not None:
        maximum = top.amax(0)
        rescale = torch.exp2(top - maximum)
        total.mul_(rescale)
        if output is not None:
            output.mul_(rescale)
    return _Sums(_added(total), None if output is None else _added(output), maximum, above)


def _added(parts: Tensor) -> Tensor:
    return parts.sum(0) if len(parts) > 1 else parts[0]


def _joined(blocks: list[_Sums]) -> _Sums:
    if len(blocks) == 1:
        return blocks[0]
    fields: list[Any] = [None if field[0] is None else torch.cat(field) for field in zip(*blocks)]
    return _Sums(*fields)


def infonce_grad_negatives(
    grad_loss: Tensor,
    query: Tensor,
    negatives: Tensor,
    lse: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
    dot_dtype: torch.dtype,
) -> Tensor:
    """d (sum_i grad_loss_i loss_i) / d negatives, (K, C) float32: the probabilities are recomputed block by block.

    grad_loss, lse: (N,) float32, `lse` as `infonce_forward` returned it for the same other arguments.
    """
    inverse_t = _inverse(temperature)
    h, _ = _rows(query, normalize)
    scaled = h * (inverse_t * LOG2E)
    shift = (lse * LOG2E)[:, None]
    weighted = h * (grad_loss.float() * inverse_t)[:, None]
    result = torch.zeros(negatives.shape, device=h.device)
    sweep = _Sweep(negatives, normalize_negatives, len(h))
    for rows in _ranges(len(h), sweep.rows):
        for start, block, logits in sweep.blocks(scaled[rows]):
            if exclude_period:
                _fill_excluded(logits, rows.start, start, exclude_period)
            probabilities = logits.sub_(shift[rows]).exp2_()
            part = result[start : start + block[..., 0].numel()].view_as(block)
            part.baddbmm_(probabilities.transpose(1, 2), weighted[rows].expand(len(block), -1, -1))
    if normalize_negatives:
        for columns in _ranges(len(result), sweep.columns):
            unit, norm = _rows(negatives[columns], True)
            along = (result[columns] * unit).sum(1, keepdim=True)
            result[columns] = _through_normalize(result[columns], along, unit, norm)
    return result


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool) -> None:
    """Write keys (B, C) into the ring buffer queue (K, C) from row `pointer` (1,) int64 on, and advance it.

    Where B > K the last K keys stay, at the rows where they would have ended. No host synchronisation.
    """
    size, count = len(queue), len(keys)
    kept = min(count, size)
    values, _ = _rows(keys[count - kept :], normalize)
    index = (pointer + torch.arange(count - kept, count, device=queue.device)) % size
    queue.index_copy_(0, index, values.to(queue.dtype))
    pointer.add_(count).remainder_(size)


def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: float | Tensor) -> None:
    """t = m t + (1 - m) s in place; integer targets are copied; a tied tensor (listed twice) is updated once."""
    if isinstance(momentum, Tensor) and momentum.device.type == "cpu":
        momentum = float(momentum)
    step = 1.0 - momentum
    if isinstance(step, float) and _are_distinct_float32(targets, sources):
        torch._foreach_lerp_(targets, sources, step)
        return
    plain_targets, plain_sources = [], []
    seen = set()
    for target, source in zip(targets, sources):
        identity = (target.data_ptr(), target.shape, target.stride(), target.dtype)
        if identity in seen and target.numel():
            continue
        seen.add(identity)
        if not target.is_floating_point():
            target.copy_(source)
        elif target.dtype == source.dtype == torch.float32:
            plain_targets.append(target)
            plain_sources.append(source)
        else:
            wide = torch.promote_types(torch.promote_types(target.dtype, source.dtype), torch.float32)
            target.copy_(target.to(wide).lerp_(source.to(wide), step))
    if not plain_targets:
        return
    if isinstance(step, float):
        torch._foreach_lerp_(plain_targets, plain_sources, step)
    else:
        for target, source in zip(plain_targets, plain_sources):
            target.lerp_(source, step)


def _are_distinct_float32(targets: list[Tensor], sources: list[Tensor]) -> bool:
    """Whether all are float32 and no target is listed twice: the usual case, seen sooner for all of them at once."""
    pointers = {x.data_ptr() for x in targets}
    return len(pointers) == len(targets) and {x.dtype for x in targets + sources} == {torch.float32}


class _Sweep:
    """Block sizes and work buffers of a sweep of `count` queries over the negatives; allocated once, reused."""

    def __init__(self, negatives: Tensor, normalize: bool, count: int) -> None:
        size, dim = negatives.shape
        self.negatives, self.normalize = negatives, normalize
        self.rows = min(ROWS, count)
        part = ROWS * PART // max(self.rows, dim)
        threads = torch.get_num_threads() if negatives.device.type == "cpu" else 1
        # Every thread works on parts of its own, two of them: faster than all threads in one product.
        self.parts = min(2 * threads, MAX_PARTS) if threads > 1 else 1
        columns = max(256, part * max(self.parts, 4))
        self.columns = min(size, columns - columns % self.parts)
        self.logits: Tensor | None = None
        self.scratch: Tensor | None = None
        # float32 negatives that need no normalisation are read in place.
        self.copies = normalize or negatives.dtype != torch.float32
        self.copy = torch.empty(self.columns, dim, device=negatives.device) if self.copies else None

    def blocks(self, scaled: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per block: its first negative, the negatives (S, B, C) as float32, and scaled @ negatives.T, (S, rows, B).

        S is `parts`, or 1 in a last block that does not divide. Both tensors are buffers: the caller may overwrite
        the logits, and uses both before the next block.
        """
        # bmm copies an expanded operand at every call
        repeated = scaled.repeat(self.parts, 1, 1) if self.parts > 1 else scaled[None]
        for columns in _ranges(len(self.negatives), self.columns):
            block = self.negatives[columns]
            size = len(block)
            if self.copy is not None:
                block = self.copy[:size].copy_(block)
            if self.normalize:
                block.div_(_clamped_norm(block))
            parts = 1 if size % self.parts else self.parts
            block = block.view(parts, size // parts, -1)
            operands = repeated[:parts], block.transpose(1, 2)
            if self.logits is None:  # the first block is the largest
                self.logits = logits = torch.bmm(*operands)
            else:
                logits = torch.bmm(*operands, out=_shaped(self.logits, (parts, len(scaled), size // parts)))
            yield columns.start, block, logits

    def like(self, logits: Tensor) -> Tensor:
        """A second buffer of the same shape."""
        if self.scratch is None:
            self.scratch = torch.empty_like(logits)
        return _shaped(self.scratch, logits.shape)


def _shaped(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements of a contiguous buffer, in that shape."""
    return buffer if buffer.shape == shape else buffer.view(-1)[: math.prod(shape)].view(shape)


def _ranges(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _inverse(temperature: float | Tensor) -> float | Tensor:
    if isinstance(temperature, Tensor) and temperature.device.type == "cpu":
        temperature = float(temperature)  # costs no synchronisation there, and lets the exponentials go unshifted
    return temperature.float().reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def _clamped_norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(EPS)


def _rows(vectors: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """The vectors (M, C) in float32, divided by their norms if asked, and these norms (M, 1)."""
    vectors = vectors.float()
    if not normalize:
        return vectors, None
    norm = _clamped_norm(vectors)
    return vectors / norm, norm


def _through_normalize(grad: Tensor, along: Tensor, unit: Tensor, norm: Tensor | None) -> Tensor:
    """Gradient with respect to a vector, from that with respect to unit = vector / norm (None: not normalised) and
    from along = grad . unit, (M, 1), which is overwritten."""
    if norm is None:
        return grad
    along.masked_fill_(norm <= EPS, 0.0)  # there the divisor is the constant EPS
    return grad.addcmul(unit, along, value=-1).div_(norm)


def _fill_excluded(logits: Tensor, row: int, column: int, period: int) -> None:
    """-inf where (row + i) % period == (column + j) % period, for logits of rows i and columns j at that offset,
    (S, rows, B): the columns of split s come after those of split s - 1."""
    _, count, width = logits.shape
    for split in logits:
        first = (row - column) % period - ((count - 1) // period + 1) * period
        for offset in range(first, width, period):
            if offset > -count:
                split.diagonal(offset).fill_(-math.inf)
        column += width
