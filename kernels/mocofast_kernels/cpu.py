"""The kernels in plain PyTorch: blocked InfoNCE, EMA and enqueue, for the CPU and for any device without Triton.

One pass over the negatives gives the loss and its gradient, as attention whose keys and values are both the queue
(He et al. 2020, arXiv:1911.05722, eq. 1, differentiated). With unit vectors h = query / |query|, k+ the positive,
n_j the negatives, s_j = h.n_j and a = log-sum-exp over the negatives of s_j / T:

    d = a - s_+ / T,    loss = softplus(d),    w = sigmoid(d)  (the negatives' share of the softmax)
    dL/dh = w (O - k+) / T  with  O = sum_j softmax_j(s / T) n_j,    dL/d(1/T) = h . w (O - k+)

Writing the positive apart from the negatives loses no digits when it dominates (loss near 0).

What made it fast on the CPU, in order of effect: no N x K array (a block of logits stays in the cache and is
overwritten by its exponentials), `exp2` instead of `exp` (PyTorch's is four times as fast in float32; log2(e) / T is
folded into the query), one part of every block per thread, no maximum and no shift where the logits are bounded.
docs/log.md has the numbers.

Everything is computed in float32 whatever `dot_dtype` asks: bfloat16 products are hundreds of times slower on CPUs
without the instructions for them. Runs are bit-equal on one machine with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # below this norm a vector is divided by EPS instead, as torch.nn.functional.normalize does
LOG2E = 1.0 / math.log(2.0)
# Largest 1/T whose exponentials need no shift: K exp(1/T) and exp(-1/T) stay normal float32 numbers.
UNSHIFTED_MAX_INVERSE_TEMPERATURE = 60.0
ROWS = 256  # queries per block
MAX_SPLITS = 8  # parts of a block, one per thread; more would leave each product too small
COLUMNS = 3072  # negatives per block: 3 MB of logits


class InfoNCEForward(NamedTuple):
    """What one pass yields; fields that were not asked for are None."""

    loss: Tensor  # (N,) float32
    lse: Tensor  # (N,) float32: log-sum-exp over the positive and the negatives of s / T
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
    dot_dtype: torch.dtype,
) -> InfoNCEForward:
    """Per-row InfoNCE loss and its gradients, in one sweep over the negatives.

    query, positive: (N, C); negatives: (K, C); any strides, float32, bfloat16 or float16. temperature: float, or a
    0-d tensor. normalize, normalize_negatives: divide by the L2 norm over C first. exclude_period P > 0: negative j
    is left out of row i where j % P == i % P. dot_dtype is ignored here (float32 always).
    """
    inverse_t = _inverse(temperature)
    unshifted = normalize and isinstance(inverse_t, float) and inverse_t <= UNSHIFTED_MAX_INVERSE_TEMPERATURE
    h, query_norm = _rows(query, normalize)
    key, key_norm = _rows(positive, normalize)
    count = len(h)
    score_positive = (h * key).sum(1)
    scale = inverse_t * LOG2E  # logits below are in units of log 2
    logit_positive = score_positive * scale
    scaled = h * scale

    sweep = _Sweep(negatives, normalize_negatives, count)
    flags = torch.empty_like(sweep.logits) if return_rank else None
    maximum = torch.zeros_like(logit_positive)
    weight_sum = torch.empty_like(logit_positive)  # sum over negatives of exp2(logit - maximum)
    output = torch.empty_like(h) if compute_grad else None  # sum over negatives of exp2(logit - maximum) negative
    above = torch.zeros_like(logit_positive, dtype=torch.int32) if return_rank else None
    for rows in _ranges(count, sweep.rows):
        shape = (sweep.splits, len(h[rows]))
        total = torch.zeros(shape, device=h.device)
        top = torch.zeros_like(total) if unshifted else logit_positive[rows].repeat(sweep.splits, 1)
        partial = torch.zeros(*shape, h.shape[1], device=h.device) if compute_grad else None
        for start, block, logits in sweep.blocks(scaled[rows]):
            splits = slice(len(block))
            if exclude_period:
                _fill_excluded(logits, rows.start, start, exclude_period)
            if above is not None and flags is not None:
                # Comparing into float32 is several times as fast as into booleans; exact, as a block has < 2**24.
                wins = flags[: logits.numel()].view_as(logits)
                above[rows] += torch.gt(logits, logit_positive[rows, None], out=wins).sum((0, 2)).int()
            if not unshifted:
                new_top = torch.maximum(top[splits], logits.amax(2))
                rescale = torch.exp2(top[splits] - new_top)
                top[splits] = new_top
                total[splits] *= rescale
                if partial is not None:
                    partial[splits] *= rescale[:, :, None]
                logits.sub_(new_top[:, :, None])
            weights = logits.exp2_()
            total[splits] += weights.sum(2)
            if partial is not None:
                partial[splits].baddbmm_(weights, block)
        if not unshifted:
            maximum[rows] = top.amax(0)
            rescale = torch.exp2(top - maximum[rows])
            total *= rescale
            if partial is not None:
                partial *= rescale[:, :, None]
        weight_sum[rows] = total.sum(0)
        if output is not None and partial is not None:
            output[rows] = partial.sum(0)

    # log(0) = -inf where no negative counts: loss 0.
    difference = (maximum - logit_positive) / LOG2E + weight_sum.log()
    loss = torch.nn.functional.softplus(difference)
    lse = score_positive * inverse_t + loss
    if output is None:
        return InfoNCEForward(loss, lse, above, None, None, None)
    share = torch.sigmoid(difference)
    # The clamp only meets 0 / 0, where no negative counts; it lets NaN through.
    mean_key = output.div_(weight_sum.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    grad = mean_key.sub_(key).mul_(share[:, None])
    grad_scale = (h * grad).sum(1)
    grad_query = _through_normalize(grad.mul_(inverse_t), h, query_norm)
    grad_positive = _through_normalize(h * (-share * inverse_t)[:, None], key, key_norm)
    return InfoNCEForward(loss, lse, above, grad_query, grad_positive, grad_scale)


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
            result[columns] = _through_normalize(result[columns], unit, norm)
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
        # Each thread takes a part of every block: 16% faster than all threads in one product.
        self.splits = min(torch.get_num_threads(), MAX_SPLITS) if negatives.device.type == "cpu" else 1
        columns = max(256, ROWS * COLUMNS // max(self.rows, dim))
        self.columns = min(size, columns - columns % self.splits)
        self.logits = torch.empty(self.rows * self.columns, device=negatives.device)
        # float32 negatives that need no normalisation are read in place.
        self.copies = normalize or negatives.dtype != torch.float32
        self.copy = torch.empty(self.columns if self.copies else 0, dim, device=negatives.device)

    def blocks(self, scaled: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per block: its first negative, the negatives (S, B, C) as float32, and scaled @ negatives.T, (S, rows, B).

        S is `splits`, or 1 in a last block that does not divide. Both tensors are buffers: the caller may overwrite
        the logits, and uses both before the next block.
        """
        # bmm copies an expanded operand at every call
        repeated = scaled.repeat(self.splits, 1, 1) if self.splits > 1 else scaled[None]
        for columns in _ranges(len(self.negatives), self.columns):
            block = self.negatives[columns]
            size = len(block)
            if self.copies:
                block = self.copy[:size].copy_(block)
            if self.normalize:
                block.div_(_clamped_norm(block)[:, None])
            splits = 1 if size % self.splits else self.splits
            block = block.unflatten(0, (splits, size // splits))
            logits = self.logits[: len(scaled) * size].view(splits, len(scaled), size // splits)
            yield columns.start, block, torch.bmm(repeated[:splits], block.transpose(1, 2), out=logits)


def _ranges(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _inverse(temperature: float | Tensor) -> float | Tensor:
    if isinstance(temperature, Tensor) and temperature.device.type == "cpu":
        temperature = float(temperature)  # costs no synchronisation there, and lets the exponentials go unshifted
    return temperature.float().reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def _clamped_norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).clamp_min(EPS)


def _rows(vectors: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """The vectors (M, C) in float32, divided by their norms if asked, and these norms (M,)."""
    vectors = vectors.float()
    if not normalize:
        return vectors, None
    norm = _clamped_norm(vectors)
    return vectors / norm[:, None], norm


def _through_normalize(grad: Tensor, unit: Tensor, norm: Tensor | None) -> Tensor:
    """Gradient with respect to a vector, from that with respect to unit = vector / norm (None: not normalised)."""
    if norm is None:
        return grad
    along = (grad * unit).sum(1)
    along.masked_fill_(norm <= EPS, 0.0)  # there the divisor is the constant EPS
    return grad.addcmul(unit, along[:, None], value=-1).div_(norm[:, None])


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
