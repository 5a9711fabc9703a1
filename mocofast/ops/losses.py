"""InfoNCE on fused kernels.

CUDA tensors go to Triton kernels, CPU tensors to compiled loops where the CPU has AVX-512, and all
other tensors to blocked PyTorch operators. Every argument is checked here, before anything runs.
"""

from __future__ import annotations

from typing import Literal, overload

from mocofast_kernels.exclusion import Exclusion
from torch import Tensor

from mocofast.ops import autograd, own_negatives
from mocofast.ops.checks import (
    check_features,
    check_reduction,
    check_rows,
    check_same,
    check_several,
    check_width,
    checked_ids,
    checked_mask,
    checked_temperature,
)
from mocofast.ops.in_batch import small_loss
from mocofast.ops.sweep import reduced


@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    return_rank: Literal[False] = False,
    negatives_normalized: bool = False,
    own_rows: slice | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    return_rank: Literal[True],
    negatives_normalized: bool = False,
    own_rows: slice | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    return_rank: bool = False,
    negatives_normalized: bool = False,
    own_rows: slice | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE: cross entropy of one positive against K negatives for every query.

    loss_i = -log(exp(q_i.k_i / T) / (exp(q_i.k_i / T) + sum_j exp(q_i.n_j / T)))
    (van den Oord et al. 2018, arXiv:1807.03748, eq. 4; in MoCo: arXiv:1911.05722, eq. 1)

    query: (N, C), float32, bfloat16 or float16, any strides. Inputs may differ in dtype. On a CPU
        all inputs may also be float64. Dense features (N, L, C) have a loss at every one of the L
        places (DenseCL, arXiv:2011.09157): N x L queries.
    positive_key: shape of query. With own_rows: (M, C), the keys of all ranks.
    negative_keys: (K, C). None takes in-batch negatives: query i meets every row of
        positive_key, its own positive excepted. (N, M, C): every row n has M negatives of its own
        (hard negatives), which all places of a dense query share. This form computes in float32
        and keeps N x M logits for backward (N x L x M of dense features).
    temperature: T > 0, a float or a 0-d tensor. A tensor may require a gradient. Its value is
        checked on the CPU only, because a check on CUDA would make the host wait.
    reduction: "mean" or "sum" returns (), "none" returns (N,), of dense features (N, L).
    normalize: divides all inputs by their L2 norms over C, inside the kernel.
    return_rank: also returns how many negatives score above the positive, (N,) or (N, L) int32.
        The positive loses a tie: a negative whose score is equal, to rounding, counts, so equal
        features give no hit. A query whose loss is NaN has all negatives above.
        Top-k accuracy is the mean of (rank < k).
    negatives_normalized: promises unit vectors as negatives, as in a queue, and saves their
        normalisation. Longer vectors may then overflow to inf.
    own_rows: slice(start, stop) of length N, for in-batch negatives of several ranks. The
        positive of query i is positive_key[start + i], as in MoCo v3's
        `labels = arange(N) + N * rank`. None: all rows.
    query_ids, key_ids: integers, (N,) or (N, L), and (K,) or (N, M): a negative with the id of the
        query is left out, for example an earlier key of the same image in the queue. No (N, K)
        tensor is made. For in-batch negatives key_ids are those of positive_key, and may be left
        out where they equal query_ids. On CUDA the sweep compares the ids.
    exclude: True where a negative is left out, a bool tensor (N, K), of dense features (N, L, K),
        of own negatives the same with M. On CUDA the blocked PyTorch path runs instead of the
        kernel. Prefer ids.

    Returns the float32 loss (float64 for float64 inputs), or (loss, rank). Gradients reach all
    inputs that require a gradient, in their own dtypes. No (N, K) tensor is kept for backward. The
    negatives may be overwritten before backward, unless they require a gradient.
    Raises ValueError or TypeError, naming the argument. A second derivative raises RuntimeError,
    and the transforms of torch.func do, too, except vmap without a gradient, which computes the
    problems in turns.

    MoCo v3 on every rank (the keys carry no gradient):

        keys = k.new_empty(world_size * len(k), k.shape[1])  # (W*N, C)
        torch.distributed.all_gather_into_tensor(keys, k)
        own_rows = slice(rank * len(k), (rank + 1) * len(k))
        loss = info_nce(q, keys, temperature=0.2, own_rows=own_rows)
    """
    # All arguments are checked before anything runs.
    dense = isinstance(query, Tensor) and query.dim() == 3
    shape = "(N, L, C)" if dense else "(N, C)"
    check_features("query", query, shape)
    _check_keys(query, positive_key, negative_keys, own_rows, shape)
    temperature = checked_temperature(temperature, query.device)
    check_reduction(reduction)
    rows, has_own = query.shape[:-1], negative_keys is not None and negative_keys.dim() == 3
    negatives = positive_key if negative_keys is None else negative_keys
    if query_ids is not None or key_ids is not None:
        in_batch = negative_keys is None and own_rows is None
        key_ids = query_ids if key_ids is None and in_batch else key_ids
        expected = negatives.shape[:-1]
        query_ids = checked_ids("query_ids", query_ids, rows, query.device)
        key_ids = checked_ids("key_ids", key_ids, expected, query.device)
    if exclude is not None:
        columns = negatives.shape[1] if has_own else negatives.shape[:-1].numel()
        exclude = checked_mask("exclude", exclude, (*rows, columns), query.device)

    normalize_negatives = normalize and not negatives_normalized
    if has_own:
        loss, rank = own_negatives.info_nce(
            query,
            positive_key,
            negatives,
            temperature,
            normalize=normalize,
            normalize_negatives=normalize_negatives,
            ids=None if query_ids is None or key_ids is None else (query_ids, key_ids),
            mask=exclude,
            return_rank=return_rank,
        )
        loss = reduced(loss, reduction)
        return loss if rank is None else (loss, rank)
    # In-batch: a period of M leaves key i out of the negatives of query i.
    if dense:
        query, positive_key, negatives = (
            x.flatten(0, -2) for x in (query, positive_key, negatives)
        )
        query_ids = None if query_ids is None else query_ids.flatten()
        key_ids = None if key_ids is None else key_ids.flatten()
        exclude = None if exclude is None else exclude.flatten(0, 1)
    period = 0
    if negative_keys is None:
        if own_rows is not None and own_rows.start:  # the rotation of `own_rows_first`
            key_ids = None if key_ids is None else key_ids.roll(-own_rows.start)
            exclude = None if exclude is None else exclude.roll(-own_rows.start, 1)
        positive_key, negatives = own_rows_first(positive_key, own_rows)
        period = len(negatives)
    excluded = Exclusion(period, query_ids, key_ids, exclude)
    small = None
    has_exceptions = query_ids is not None or exclude is not None
    if period == len(query) and not has_exceptions and normalize_negatives == normalize:
        small = small_loss(
            query,
            positive_key,
            temperature,
            normalize=normalize,
            inverse=True,
            return_rank=return_rank,
            reduction=reduction,
        )
    # One sweep over the negatives: loss, and positive rank (N,) or None.
    loss, rank = small or autograd.info_nce(
        query,
        positive_key,
        negatives,
        temperature,
        normalize=normalize,
        normalize_negatives=normalize_negatives,
        excluded=excluded,
        return_rank=return_rank,
        reduction=reduction,
    )
    if dense:
        loss = loss.view(rows) if reduction == "none" else loss
        rank = None if rank is None else rank.view(rows)
    return loss if rank is None else (loss, rank)


def _check_keys(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    own_rows: slice | None,
    shape: str,
) -> None:
    """Raises unless the keys fit the query. shape: of the query, in words."""
    if own_rows is not None and (negative_keys is not None or query.dim() == 3):
        raise ValueError(
            "own_rows selects in-batch positives of queries (N, C): pass no negative_keys and no "
            "dense query beside own_rows"
        )
    check_features("positive_key", positive_key, shape if own_rows is None else "(M, C)", query)
    if own_rows is None:
        check_same("positive_key", positive_key.shape, "shape of query", query.shape)
    else:
        check_width("positive_key", positive_key, "query", query)
        check_rows("own_rows", own_rows, "positive_key", len(positive_key))
        check_same("own_rows", own_rows.stop - own_rows.start, "number of queries", len(query))
    if negative_keys is not None:
        has_own = isinstance(negative_keys, Tensor) and negative_keys.dim() == 3
        check_features("negative_keys", negative_keys, "(N, M, C)" if has_own else "(K, C)", query)
        check_width("negative_keys", negative_keys, "query", query)
        if has_own:
            check_same("negative_keys", len(negative_keys), "number of rows of query", len(query))
    else:
        check_several("positive_key without negative_keys", positive_key.shape[:-1].numel())


def own_rows_first(gathered: Tensor, own_rows: slice | None) -> tuple[Tensor, Tensor]:
    """Returns the own rows (N, C), and all rows (M, C) with the own rows rotated to the front."""
    if own_rows is None or own_rows.stop - own_rows.start == len(gathered):
        return gathered, gathered
    own = gathered[own_rows]
    return own, gathered.roll(-own_rows.start, 0) if own_rows.start else gathered
