"""The kernels in plain PyTorch: blocked InfoNCE, EMA and enqueue, for the CPU and for any device without Triton.

One pass over the negatives gives the loss and its gradient, as attention whose keys and values are both the queue
(He et al. 2020, arXiv:1911.05722, eq. 1, differentiated). With unit vectors h = query / |query|, k+ the positive,
n_j the negatives, s_j = h.n_j and a = log-sum-exp over the negatives of s_j / T:

    d = a - s_+ / T,    loss = softplus(d),    w = sigmoid(d)  (the negatives' share of the softmax)
    dL/dh = w (O - k+) / T  with  O = sum_j softmax_j(s / T) n_j,    dL/d(1/T) = h . w (O - k+)

Writing the positive apart from the negatives loses no digits when it dominates (loss near 0).

What made it fast on the CPU, in order of effect: oneDNN's float32 products instead of `torch.mm` (MKL's, half as fast
on an AMD CPU with AVX-512), no N x K array (a block of logits stays in the cache and is overwritten by its
exponentials), `exp2` instead of `exp` (PyTorch's is four times as fast in float32; log2(e) / T is folded into the
query), no maximum and no shift where the logits are bounded, and for small problems few operations. docs/log.md has
the numbers.

Everything is computed in float32 whatever `dot_dtype` asks: bfloat16 products are hundreds of times slower on CPUs
without the instructions for them. Runs are bit-equal on one machine with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # below this norm a vector is divided by EPS instead, as torch.nn.functional.normalize does
LOG2E = 1.0 / math.log(2.0)
# Largest 1/T whose exponentials need no shift: K exp(1/T) and exp(-1/T) stay normal float32 numbers.
UNSHIFTED_MAX_INVERSE_TEMPERATURE = 60.0
ROWS = 512  # queries per block
LOGITS = 2**19  # per block: 2 MB
# x @ weight.T by oneDNN, as torch.compile calls it; None in a build without it.
_ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


class InfoNCEForward(NamedTuple):
    """What one pass yields; fields that were not asked for may be None."""

    loss: Tensor  # (N,) float32
    lse: Tensor | None  # (N,) float32: log-sum-exp over the positive and the negatives of s / T
    rank: Tensor | None  # (N,) int32: negatives that score above the positive
    grad_query: Tensor | None  # (N, C) float32: d loss_i / d query_i
    grad_positive: (
        Tensor | None
    )  # (N, C) float32: d loss_i / d positive_i, through the positive logit only
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
    unshifted = (
        normalize
        and isinstance(inverse_t, float)
        and inverse_t <= UNSHIFTED_MAX_INVERSE_TEMPERATURE
    )
    h, query_norm = _rows(query, normalize)
    key, key_norm = _rows(positive, normalize)
    scaled = h * (inverse_t * LOG2E)  # logits are in units of log 2
    logit_positive = (scaled * key).sum(1, keepdim=True)
    blocks = _Blocks(negatives, normalize_negatives, len(h))
    total, output, maximum, rank = _joined(
        [
            _sums(
                blocks,
                scaled[rows],
                logit_positive[rows],
                rows.start,
                exclude_period,
                unshifted,
                return_rank,
                compute_grad,
            )
            for rows in blocks.rows
        ]
    )

    # log(0) = -inf where no negative counts: loss 0.
    difference = total.log().sub_(logit_positive, alpha=1 / LOG2E)
    if maximum is not None:
        difference.add_(maximum, alpha=1 / LOG2E)
    loss = torch.nn.functional.softplus(difference)
    lse = None if only_query else torch.add(loss, logit_positive, alpha=1 / LOG2E).squeeze(1)
    if output is None:
        return InfoNCEForward(loss.squeeze(1), lse, rank, None, None, None)
    if (
        exclude_period or maximum is not None
    ):  # 0 / 0 where no negative counts; the clamp lets NaN through
        total.clamp_min_(torch.finfo(torch.float32).tiny)
    weight = torch.sigmoid(difference).mul_(-inverse_t)
    grad = torch.addcdiv(key, output, total, value=-1).mul_(weight)
    along = (grad * h).sum(1, keepdim=True)
    grad_positive = grad_scale = None
    if not only_query:
        grad_scale = (along / inverse_t).squeeze(1)
        grad_key = h * weight
        grad_positive = _through_normalize(
            grad_key, (grad_key * key).sum(1, keepdim=True), key, key_norm
        )
    grad_query = _through_normalize(grad, along, h, query_norm)
    return InfoNCEForward(loss.squeeze(1), lse, rank, grad_query, grad_positive, grad_scale)


class _Sums(NamedTuple):
    """Over all negatives, for R queries, with w = exp2(logit - maximum)."""

    total: Tensor  # sum of w, (R, 1)
    output: Tensor | None  # sum of w negative, (R, C)
    maximum: Tensor | None  # (R, 1); None where nothing is subtracted
    above: Tensor | None  # how many logits exceed the positive's, (R,) int32


def _sums(
    blocks: _Blocks,
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
    total = output = maximum = above = flags = None
    for start, block in blocks:
        logits = product(scaled, block)
        if exclude_period:
            _fill_excluded(logits, first, start, exclude_period)
        if return_rank:
            # Comparing into float32 is several times as fast as into booleans; exact, as a block has < 2**24.
            flags = (
                torch.empty_like(logits)
                if flags is None
                else flags.view(-1)[: logits.numel()].view_as(logits)
            )
            wins = torch.gt(logits, logit_positive, out=flags).sum(1).int()
            above = wins if above is None else above.add_(wins)
        if not unshifted:
            before = logit_positive if maximum is None else maximum
            maximum = torch.maximum(before, logits.amax(1, keepdim=True))
            logits.sub_(maximum)
            if total is not None:
                rescale = torch.exp2(before - maximum)
                total.mul_(rescale)
                if output is not None:
                    output.mul_(rescale)
        weights = logits.exp2_()
        sums = weights.sum(1, keepdim=True)
        total = sums if total is None else total.add_(sums)
        if compute_grad:
            part = product(weights, block.t())
            output = part if output is None else output.add_(part)
        del logits, weights  # before the next block's
    assert total is not None  # there is a negative
    return _Sums(total, output, maximum, above)


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
    shift = lse * LOG2E
    weighted = h * (grad_loss.float() * inverse_t)[:, None]
    result = torch.zeros(negatives.shape, device=h.device)
    blocks = _Blocks(negatives, normalize_negatives, len(h))
    for rows in blocks.rows:
        for start, block in blocks:
            logits = product(block, scaled[rows])  # transposed, (B, R)
            if exclude_period:
                _fill_excluded(logits.t(), rows.start, start, exclude_period)
            probabilities = logits.sub_(shift[rows]).exp2_()
            result[start : start + len(block)].add_(product(probabilities, weighted[rows].t()))
    if normalize_negatives:
        for columns in _ranges(len(result), blocks.columns):
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
            wide = torch.promote_types(
                torch.promote_types(target.dtype, source.dtype), torch.float32
            )
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


class _Blocks:
    """How `count` queries by the negatives (K, C) are blocked, and these negatives as float32, block by block."""

    def __init__(self, negatives: Tensor, normalize: bool, count: int) -> None:
        size, dim = negatives.shape
        self.negatives, self.normalize = negatives, normalize
        self.rows = _ranges(count, ROWS)
        self.columns = min(size, max(256, LOGITS // max(min(ROWS, count), dim)))
        # float32 negatives that need no normalisation are read in place.
        in_place = negatives.dtype == torch.float32 and negatives.is_contiguous() and not normalize
        self.copy = None if in_place else torch.empty(self.columns, dim, device=negatives.device)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Number of the first negative, and negatives (B, C), contiguous; to be used before the next block."""
        for columns in _ranges(len(self.negatives), self.columns):
            block = self.negatives[columns]
            if self.copy is not None:
                block = self.copy[: len(block)].copy_(block)
            if self.normalize:
                block.div_(_clamped_norm(block))
            yield columns.start, block


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, (M, C) by (P, C), float32, by the faster library."""
    if _ONEDNN_LINEAR is not None and x.device.type == "cpu" and torch.backends.mkldnn.enabled:
        result: Tensor = _ONEDNN_LINEAR(x, weight, None, "none", [], "")
        return result
    return torch.mm(x, weight.t())


def _ranges(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _inverse(temperature: float | Tensor) -> float | Tensor:
    if isinstance(temperature, Tensor) and temperature.device.type == "cpu":
        temperature = float(
            temperature
        )  # costs no synchronisation there, and lets the exponentials go unshifted
    return (
        temperature.float().reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature
    )


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
    along.div_(
        torch.threshold(norm, EPS, math.inf)
    )  # no such part up to EPS: there the divisor is a constant
    return grad.div(norm).addcmul_(unit, along, value=-1)


def _fill_excluded(logits: Tensor, row: int, column: int, period: int) -> None:
    """-inf where (row + i) % period == (column + j) % period, for logits (R, B) of rows i and columns j."""
    count, width = logits.shape
    first = (row - column) % period - ((count - 1) // period + 1) * period
    for offset in range(first, width, period):
        if offset > -count:
            logits.diagonal(offset).fill_(-math.inf)
