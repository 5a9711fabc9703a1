"""Losses over the pairs of a small batch on a CPU, with all gradients from a single pass.

The logits of a small batch fit the cache, so they are kept: a block of a large batch is computed
again for the gradient of the keys, and once more for the columns of CLIP's loss (`cpu`). The
compiled library computes what it takes (`cpu_compiled_batch`), PyTorch's operators the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mocofast_kernels import cpu_ranks, cpu_threads
from mocofast_kernels.cpu_compiled_batch import RANGE, InBatch, Kind, compiled_batch, serves
from mocofast_kernels.cpu_products import SMALL, product
from mocofast_kernels.cpu_vectors import LOG2E, softplus, through_normalize, unit_rows, wide

LOGITS = 2**18  # most logits of a batch: 1 MB


def _is_small(query: Tensor, *args: object, **kwargs: object) -> bool:
    """Takes the arguments of the functions below."""
    return len(query) * query.numel() <= SMALL


def in_batch(
    query: Tensor,
    key: Tensor | None,
    scale: float,
    *,
    normalize: bool,
    both_ways: bool,
    return_rank: bool,
    need_key: bool,
) -> InBatch | None:
    """Returns InfoNCE of every query against the keys of all other queries, its mean and gradients.

    query, key: (N, C). Key i is the positive of query i. None: NT-Xent, where the rows are the
        views a of N / 2 images, then the views b, and every row meets all rows of other images.
    scale: 1 / T.
    normalize: divide rows by their L2 norms first.
    both_ways: the mean of this loss and of the loss of keys against queries (CLIP).
    return_rank: also count negatives, for losses one way.
    need_key: compute the gradient of the keys.

    Returns None where logits lie far apart or are not finite (exponentials then need a shift for
    every row), and for rows without a negative. Tensors must have values: no fake tensors.
    """
    if len(query) < (4 if key is None else 2):
        return None
    if serves(query, key):
        kind = Kind.VIEWS if key is None else Kind.BOTH_WAYS if both_ways else Kind.PAIRS
        return compiled_batch(
            kind,
            query,
            key,
            scale,
            normalize=normalize,
            return_rank=return_rank,
            need_key=need_key,
        )
    return _in_batch(query, key, scale, normalize, both_ways, return_rank, need_key)


@cpu_threads.one_fork(unless=_is_small)
def _in_batch(
    query: Tensor,
    key: Tensor | None,
    scale: float,
    normalize: bool,
    both_ways: bool,
    return_rank: bool,
    need_key: bool,
) -> InBatch | None:
    """Returns the results of `in_batch` by PyTorch's operators."""
    count = len(query)
    h, query_norm = unit_rows(query, normalize)
    unit_key, key_norm = (h, None) if key is None else unit_rows(key, normalize)
    positive = h.roll(count // 2, 0) if key is None else unit_key
    scaled = h * (scale * LOG2E)  # logits are in bits
    logits = product(scaled, unit_key)  # (N, N)
    low, high = map(float, logits.aminmax())
    if not high - low <= RANGE:
        return None
    logits.fill_diagonal_(-torch.inf)
    if key is None:
        for offset in (count // 2, -(count // 2)):
            logits.diagonal(offset).fill_(-torch.inf)
    logit_positive = (scaled * positive).sum(1)
    rank = None
    if return_rank:
        reach = logits >= cpu_ranks.least_tie(scaled, positive)
        rank = reach.sum(1, dtype=torch.int32)
    weights = logits.sub_(high).exp2_()
    # Sums over the keys of a query, then over the queries of a key: the losses, and the share of a
    # negative's weight in the gradient.
    totals = torch.stack([weights.sum(dim) for dim in ((1, 0) if both_ways else (1,))])
    difference = totals.log2().add_(high).sub_(logit_positive).div_(LOG2E)
    loss, factor = softplus(difference).mean(), scale / difference.numel()
    shares = torch.sigmoid(difference)
    positive_share = shares.sum(0)
    shares.div_(totals)
    weights.mul_(shares[0][:, None] + shares[1] if both_ways else shares[0][:, None])
    if key is None:  # a row is a query and a key
        weights = weights + weights.t()
        positive_share = positive_share + positive_share.roll(count // 2)
    part = positive_share[:, None]
    grad = torch.addcmul(product(weights, unit_key.t()), part, positive, value=-1).mul_(factor)
    along = (grad * h).sum(1, keepdim=True)
    grad_scale = along.sum() / (2 * scale if key is None else scale)
    grad_key = None
    if need_key and key is not None:
        grad_key = torch.addcmul(product(weights.t(), h.t()), part, h, value=-1).mul_(factor)
        if normalize:
            along_key = (grad_key * unit_key).sum(1, keepdim=True)
            grad_key = through_normalize(grad_key, along_key, unit_key, key_norm)
    return InBatch(loss, rank, through_normalize(grad, along, h, query_norm), grad_key, grad_scale)


def supervised(query: Tensor, labels: Tensor, scale: float, *, normalize: bool) -> InBatch | None:
    """Returns the supervised contrastive loss over the rows with positives, and its gradient.

    query: (N, C). labels: (N,). A row's positives are the other rows with its label.
    scale, normalize, None: as for `in_batch`.
    """
    if len(query) < 2:
        return None
    if serves(query, None):
        labels = labels.contiguous()
        return compiled_batch(Kind.LABELS, query, None, scale, labels=labels, normalize=normalize)
    return _supervised(query, labels, scale, normalize)


@cpu_threads.one_fork(unless=_is_small)
def _supervised(query: Tensor, labels: Tensor, scale: float, normalize: bool) -> InBatch | None:
    """Returns the results of `supervised` by PyTorch's operators."""
    h, norm = unit_rows(query, normalize)
    logits = product(h * (scale * LOG2E), h)  # (N, N), in bits
    low, high = map(float, logits.aminmax())
    if not high - low <= RANGE:
        return None
    positives = labels[:, None].eq(labels).fill_diagonal_(False).to(h.dtype)
    count = positives.sum(1)
    has_positives = count.clamp(max=1)
    positives.div_(count.clamp(min=1)[:, None])  # the mean over a row's positives
    logit_positive = (logits * positives).sum(1)
    weights = logits.sub_(high).exp2_().fill_diagonal_(0)
    total = weights.sum(1)
    losses = total.log2().add_(high).sub_(logit_positive).mul_(has_positives).div_(LOG2E)
    rows = has_positives.sum().clamp_(min=1)
    weights.mul_((has_positives / total)[:, None]).sub_(positives)
    grad = product(weights + weights.t(), h.t()).mul_(scale / rows)
    along = (grad * h).sum(1, keepdim=True)
    grad_scale = along.sum() / (2 * scale)
    return InBatch(
        losses.sum() / rows, None, through_normalize(grad, along, h, norm), None, grad_scale
    )


def sigmoid(
    query: Tensor, key: Tensor, scale: float, bias: float, *, need_key: bool
) -> InBatch | None:
    """Returns SigLIP's loss of all pairs of rows, a sum over N keys and a mean over N queries.

    query, key: (N, C). Key i is the positive of query i. scale, bias: of the dot products.
    need_key: compute the gradient of the keys.
    """
    if serves(query, key):
        return compiled_batch(Kind.SIGMOID, query, key, scale, bias=bias, need_key=need_key)
    return _sigmoid(query, key, scale, bias, need_key)


@cpu_threads.one_fork(unless=_is_small)
def _sigmoid(query: Tensor, key: Tensor, scale: float, bias: float, need_key: bool) -> InBatch:
    """Returns the results of `sigmoid` by PyTorch's operators."""
    x, y = wide(query), wide(key)
    margins = product(x * -scale, y).sub_(bias)  # (N, N), of the negatives
    margins.diagonal().neg_()
    # The exponentials of the loss serve the gradient.
    losses, exponentials = torch.ops.aten.log_sigmoid_forward(margins)
    loss = losses.sum() / -len(x)
    share = loss.new_tensor(1 / len(x)).expand_as(margins)
    weights = torch.ops.aten.log_sigmoid_backward(share, margins, exponentials)
    weights.diagonal().neg_()
    grad = product(weights, y.t())
    grad_scale = (grad * x).sum()
    grad_key = product(weights.t(), x.t()).mul_(scale) if need_key else None
    return InBatch(loss, None, grad.mul_(scale), grad_key, grad_scale, weights.sum())
