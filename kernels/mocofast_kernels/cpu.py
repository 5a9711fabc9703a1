"""InfoNCE in plain PyTorch, for CPUs and devices without Triton.

One pass over the negatives gives the loss and the gradient, as attention whose keys and values
are the queue (He et al. 2020, arXiv:1911.05722, eq. 1, differentiated). With unit vectors
h = query / |query|, k+ the positive, n_j the negatives, s_j = h.n_j and
a = log-sum-exp over the negatives of s_j / T:

    d = a - s_+ / T,    loss = softplus(d),    w = sigmoid(d)  (the negatives' share of the softmax)
    dL/dh = w (O - k+) / T  with  O = sum_j softmax_j(s / T) n_j,    dL/d(1/T) = h . w (O - k+)

With the positive apart from the negatives, no digits are lost when the positive dominates
(loss near 0).

On a CPU with AVX-512 the sums over the negatives come from a compiled sweep (`cpu_sweep`), where
logits need no maximum and all negatives count. PyTorch's operators compute all other sums. What
made them fast, in order of effect (docs/log.md has the numbers):
- oneDNN's float32 products instead of `torch.mm`: MKL's products are half as fast on an AMD CPU
  with AVX-512;
- no N x K array: a block of logits stays in the cache and is overwritten by the exponentials;
- `exp2`, four times as fast as `exp` in float32, with log2(e) / T multiplied into the query;
- no maximum and no shift where the logits are bounded, and few operations for small problems;
- a thread computes whole blocks alone (`cpu_threads`): threads that divide every operation wait
  for each other 6 times a block, and beside a busy process the call then took 8 times as long.

A thread needs up to 4 MB for a block of logits and its sums.

Where `dot_dtype` asks for bfloat16, a large problem of unit vectors multiplies bfloat16 operands on
a CPU with instructions for bfloat16, in half of the time (`cpu_products`, `cpu_sweep`). All sums,
exponentials and results are float32. Runs are bit-equal on the same machine with the same number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocofast_kernels import cpu_ranks, cpu_sweep, cpu_threads
from mocofast_kernels.cpu_one_block import compiled_block, is_one_block, one_block
from mocofast_kernels.cpu_products import SMALL, Scratch, cpu_bf16, operand_dtype, weighted_sums
from mocofast_kernels.cpu_sums import Sums, joined, merged, sums_of
from mocofast_kernels.cpu_vectors import (
    LOG2E,
    clamped_norm,
    gradient_dtype,
    softplus,
    through_normalize,
    unit_rows,
    wide,
)
from mocofast_kernels.exclusion import Exclusion

# Largest 1/T whose exponentials need no shift: K exp(1/T) and exp(-1/T) are normal float32 numbers.
UNSHIFTED_MAX_INVERSE_TEMPERATURE = 60.0
ROWS = 512  # queries per block
LOGITS = 2**19  # per block: 2 MB. Twice as many in the sweep, which stores none
LEAST_LOGITS = 2**16  # per block, where large blocks would leave a thread without work


class InfoNCEForward(NamedTuple):
    """Result of a forward pass. Fields may be None unless asked for.

    float32 is float64 for a query of float64. With `mean`: loss () is the mean over rows, all
    gradients are gradients of the mean, and grad_query and grad_positive have the dtype that
    `gradient_dtype` gives for query and positive.
    """

    loss: Tensor  # (N,) float32
    lse: Tensor | None  # (N,) float32: log-sum-exp of s / T over the positive and the negatives
    # (N,) int32: how many negatives score as high as the positive, or higher: all where the loss is
    # NaN
    rank: Tensor | None
    grad_query: Tensor | None  # (N, C) float32: d loss_i / d query_i
    # (N, C) float32: d loss_i / d positive_i, through the positive logit only
    grad_positive: Tensor | None
    grad_scale: Tensor | None  # (N,) float32: d loss_i / d (1/T)


def is_small(rows: Tensor, _: Tensor, negatives: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Takes the arguments of the functions below. rows: (N, ...)."""
    return products(rows, _, negatives) <= SMALL


def products(rows: Tensor, _: Tensor, negatives: Tensor, *args: Any, **kwargs: Any) -> int:
    """Returns N K C. Takes the arguments of the functions below."""
    return len(rows) * negatives.numel()


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
    only_query: bool = False,
    dot_dtype: torch.dtype,
    mean: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> InfoNCEForward:
    """Returns the InfoNCE loss of every row and the gradients, from a sweep over the negatives.

    query, positive: (N, C), float32, bfloat16 or float16, any strides, or all float64.
    negatives: (K, C), types and strides as query.
    temperature: float, or a tensor ().
    normalize: divide query and positive by their L2 norms over C first.
    normalize_negatives: divide the negatives likewise.
    exclude_period: P > 0 leaves negative j out of row i where j % P == i % P.
    return_rank: count the negatives that score as high as the positive, to rounding, or higher.
    compute_grad: compute gradients.
    only_query: compute the gradient of the query alone.
    dot_dtype: type of the operands of products over the negatives. float32 takes the place of
        float16 always, and of bfloat16 where `operand_dtype` says float32.
    mean: return the mean of the losses and its gradients.
    query_ids, key_ids, mask: leave out negatives, as `Exclusion` says.
    """
    excluded = Exclusion(exclude_period, query_ids, key_ids, mask)
    # Operands. Logits of unit vectors are bounded, so they need no maximum unless T is small.
    inverse_t = _inverse(temperature)
    unshifted = normalize and _is_unshifted(inverse_t)
    operand = operand_dtype(dot_dtype, unshifted, query, negatives)
    is_plain = (
        unshifted and only_query and compute_grad and not excluded and query.dtype != torch.float64
    )
    # Up to the library's limit float32 is faster than bfloat16, but for AMX.
    if is_plain and (operand == torch.float32 or cpu_bf16() != "AMX"):
        assert isinstance(inverse_t, float)  # because `unshifted`
        given = query, positive, negatives, inverse_t, normalize_negatives, return_rank, mean
        found = compiled_block(*given)
        if found is not None:
            loss, rank, grad = found
            return InfoNCEForward(loss, None, rank, grad, None, None)
    return _forward(
        query,
        positive,
        negatives,
        inverse_t,
        excluded,
        operand,
        normalize=normalize,
        normalize_negatives=normalize_negatives,
        return_rank=return_rank,
        compute_grad=compute_grad,
        only_query=only_query,
        mean=mean,
        is_plain=is_plain,
        unshifted=unshifted,
    )


@cpu_threads.one_fork(unless=is_small, products=products)
def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    inverse_t: float | Tensor,
    excluded: Exclusion,
    operand: torch.dtype,
    *,
    normalize: bool,
    normalize_negatives: bool,
    return_rank: bool,
    compute_grad: bool,
    only_query: bool,
    mean: bool,
    is_plain: bool,
    unshifted: bool,
) -> InfoNCEForward:
    """Does what `infonce_forward` does, by PyTorch's operators and the sweep over blocks."""
    if is_plain:
        assert isinstance(inverse_t, float)  # because `unshifted`
        given = query, positive, negatives, inverse_t, normalize_negatives, return_rank, mean
        if operand == torch.float32 and is_one_block(query, negatives):
            loss, rank, grad = one_block(*given)
            return InfoNCEForward(loss, None, rank, grad, None, None)
        kinds = operand, normalize_negatives, return_rank
        ends = cpu_sweep.ends_of(query, positive, negatives, inverse_t, *kinds)
        if ends is not None:
            blocks = Blocks(negatives, False, len(query), operand, True)
            sums = _swept(ends.sweep, blocks, normalize_negatives, ends.tie, True)
            loss, rank, grad = ends.finish(sums, len(negatives), mean)
            grad = grad.to(gradient_dtype(query.dtype)) if mean else grad
            return InfoNCEForward(loss, None, rank, grad, None, None)
    h, query_norm = unit_rows(query, normalize)  # (N, C)
    key, key_norm = unit_rows(positive, normalize)  # (N, C)
    scaled = h * (inverse_t * LOG2E)  # logits are in units of log 2
    logit_positive = (scaled * key).sum(1, keepdim=True)  # (N, 1)

    # Sums over the negatives, for blocks of queries.
    queries = scaled.to(operand)
    sweep = None
    if unshifted and not excluded and not is_one_block(query, negatives):
        sweep = cpu_sweep.sweep_of(queries)
    tie = None
    if sweep is None:
        blocks = Blocks(negatives, normalize_negatives, len(h), operand)
        if return_rank:
            equal = cpu_ranks.as_stored(key, negatives, normalize_negatives)
            tie = cpu_ranks.least_tie(queries, equal.to(operand))
        options = (excluded, unshifted, compute_grad, Scratch())

        def compute(block: tuple[slice, slice]) -> Sums:
            rows, columns = block
            own = queries[rows], logit_positive[rows], None if tie is None else tie[rows], block
            return sums_of(blocks[columns], *own, *options)

        found = _over(blocks, compute)
    else:
        blocks = Blocks(negatives, False, len(h), operand, True)
        if return_rank:
            equal = cpu_sweep.equal_keys(positive, negatives, operand, normalize_negatives)
            tie = cpu_ranks.least_tie(queries.float(), equal)
        found = _swept(sweep, blocks, normalize_negatives, tie, compute_grad)
    total, output, maximum, positive_rank = found

    # Loss = softplus(log(sum) - positive logit). A row without negatives: softplus(-inf) = 0.
    difference = total.log().sub_(logit_positive, alpha=1 / LOG2E)
    if maximum is not None:
        difference.add_(maximum, alpha=1 / LOG2E)
    loss = softplus(difference)
    if positive_rank is not None:
        cpu_ranks.without_nan(positive_rank, loss.squeeze(1), len(negatives), excluded.period)
    lse = None if only_query else torch.add(loss, logit_positive, alpha=1 / LOG2E).squeeze(1)
    loss = loss.squeeze(1)
    returned_loss = loss.mean() if mean else loss
    if output is None:
        return InfoNCEForward(returned_loss, lse, positive_rank, None, None, None)

    # Gradients. The clamp avoids 0 / 0 for a row without negatives, and keeps NaN.
    if excluded or maximum is not None:
        total.clamp_min_(torch.finfo(torch.float32).tiny)
    rows = len(loss) if mean else 1
    weight = torch.sigmoid(difference).mul_(-inverse_t / rows)
    grad = torch.addcdiv(key, output, total, value=-1).mul_(weight)
    along = (grad * h).sum(1, keepdim=True)
    grad_positive = grad_scale = None
    if not only_query:
        grad_scale = (along / inverse_t).squeeze(1)
        grad_key = h * weight
        grad_positive = through_normalize(
            grad_key, (grad_key * key).sum(1, keepdim=True), key, key_norm
        )
    grad_query = through_normalize(grad, along, h, query_norm)
    if mean:
        grad_query = grad_query.to(gradient_dtype(query.dtype))
        if grad_positive is not None:
            grad_positive = grad_positive.to(gradient_dtype(positive.dtype))
    return InfoNCEForward(returned_loss, lse, positive_rank, grad_query, grad_positive, grad_scale)


def _swept(
    sweep: cpu_sweep.Sweep, blocks: Blocks, normalize: bool, tie: Tensor | None, output: bool
) -> Sums:
    """Returns the sums over all negatives by the compiled sweep."""

    def compute(block: tuple[slice, slice]) -> Sums:
        rows, columns = block
        own_tie = None if tie is None else tie[rows]
        total, out, above = sweep.sums(blocks[columns], rows, normalize, own_tie, output)
        return Sums(total, out, None, above)

    return _over(blocks, compute)


def _over(blocks: Blocks, compute: Callable[[tuple[slice, slice]], Sums]) -> Sums:
    """Returns the sums over all negatives. compute: of some queries over a block of negatives."""
    sums: dict[int, Sums] = {}  # first row: sums of the rows over the merged blocks

    def merge(block: tuple[slice, slice], part: Sums) -> None:
        first = block[0].start
        sums[first] = merged(sums[first], part) if first in sums else part

    pairs = [(rows, columns) for rows in blocks.rows for columns in blocks.columns]
    cpu_threads.in_order(compute, pairs, merge)
    return joined(list(sums.values()))


@cpu_threads.one_fork(unless=is_small, products=products)
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
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of sum_i grad_loss_i loss_i by the negatives, (K, C) float32.

    Recomputes the probabilities block by block.

    grad_loss: (N,) float32.
    lse: (N,) float32, from `infonce_forward` with equal arguments.
    Further arguments: as for `infonce_forward`.
    """
    excluded = Exclusion(exclude_period, query_ids, key_ids, mask)
    inverse_t = _inverse(temperature)
    h, _ = unit_rows(query, normalize)
    scaled = h * (inverse_t * LOG2E)
    shift = lse * LOG2E
    weighted = h * (wide(grad_loss) * inverse_t)[:, None]
    result = torch.zeros(negatives.shape, dtype=h.dtype, device=h.device)
    unshifted = normalize and _is_unshifted(inverse_t)
    operand = operand_dtype(dot_dtype, unshifted, h, negatives)
    blocks = Blocks(negatives, normalize_negatives, len(h), operand)
    queries, factors = scaled.to(operand), weighted.to(operand)
    scratch = Scratch()

    def compute(columns: slice) -> None:
        block, part = blocks[columns], result[columns]
        for rows in blocks.rows:
            logits = scratch.product(block, queries[rows])  # transposed, (B, R)
            if excluded:
                excluded.fill(logits.t(), rows, columns)
            probabilities = logits.sub_(shift[rows]).exp2_()
            part.add_(weighted_sums(scratch.operand(probabilities, operand), factors[rows]))
        if normalize_negatives:
            norm = clamped_norm(wide(negatives[columns]))
            along = (part * block).sum(1, keepdim=True)
            part.copy_(through_normalize(part, along, block, norm))

    cpu_threads.in_order(compute, blocks.columns, lambda columns, part: None)
    return result


class Blocks:
    """Divides queries and negatives into blocks.

    rows: slices of the queries.
    columns: slices of the negatives.
    """

    def __init__(
        self,
        negatives: Tensor,
        normalize: bool,
        count: int,
        dtype: torch.dtype,
        swept: bool = False,
    ) -> None:
        """negatives: (K, C). count: number of queries. dtype: of the blocks. swept: by `Sweep`."""
        size, dim = negatives.shape
        self.negatives, self.normalize, self.dtype = negatives, normalize, dtype
        self.rows = _ranges(count, ROWS)
        width = max(min(ROWS, count), dim)
        columns = LOGITS * (2 if swept else 1) // width
        if (threads := cpu_threads.count()) > 1:  # small blocks where threads would be without work
            shared = -(-size * len(self.rows) // (2 * threads))
            columns = min(columns, max(shared, LEAST_LOGITS // width))
        self.columns = _ranges(size, min(size, max(256, columns)))

    def __getitem__(self, columns: slice) -> Tensor:
        """Returns a block of negatives, (B, C) dtype, contiguous, normalised if asked for.

        Negatives of the dtype that need no normalisation are not copied.
        """
        dtype = torch.promote_types(self.dtype, torch.float32) if self.normalize else self.dtype
        block = self.negatives[columns].to(dtype).contiguous().resolve_neg()
        return (block / clamped_norm(block)).to(self.dtype) if self.normalize else block


def _ranges(size: int, step: int) -> list[slice]:
    """Returns slices of `step` items, which cover `size` items."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _inverse(temperature: float | Tensor) -> float | Tensor:
    """Returns 1 / T, for a tensor on the CPU as a float: known logits need no shift."""
    if isinstance(temperature, Tensor) and temperature.device.type != "cpu":
        return temperature.float().reciprocal()
    return 1.0 / float(temperature)


def _is_unshifted(inverse_t: float | Tensor) -> bool:
    """Says whether exponentials of the logits of unit vectors need no shift."""
    return isinstance(inverse_t, float) and inverse_t <= UNSHIFTED_MAX_INVERSE_TEMPERATURE
