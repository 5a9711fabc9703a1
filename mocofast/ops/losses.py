"""Contrastive losses on fused kernels.

CUDA tensors go to Triton kernels, all other tensors to blocked PyTorch operators. Every argument is
checked here, before anything runs.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mocofast.ops import autograd
from mocofast.ops.checks import (
    check_matrix,
    check_reduction,
    check_rows,
    check_same,
    check_width,
    checked_temperature,
)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE: cross entropy of one positive against K negatives for every query.

    loss_i = -log(exp(q_i.k_i / T) / (exp(q_i.k_i / T) + sum_j exp(q_i.n_j / T)))
    (van den Oord et al. 2018, arXiv:1807.03748, eq. 4; in MoCo: arXiv:1911.05722, eq. 1)

    query: (N, C), float32, bfloat16 or float16, any strides. Inputs may differ in dtype.
    positive_key: (N, C). With own_rows: (M, C), the keys of all ranks.
    negative_keys: (K, C). None takes in-batch negatives: query i meets every row of
        positive_key, its own positive excepted.
    temperature: T > 0, a float or a 0-d tensor. A tensor may require a gradient. Its value is
        checked on the CPU only, because a check on CUDA would make the host wait.
    reduction: "mean" or "sum" returns (), "none" returns (N,).
    normalize: divides all inputs by their L2 norms over C, inside the kernel.
    return_rank: also returns how many negatives score above the positive, (N,) int32. The
        positive loses a tie: a negative whose score is equal, to rounding, counts, so equal
        features give no hit. A query whose loss is NaN has all negatives above.
        Top-k accuracy is the mean of (rank < k).
    negatives_normalized: promises unit vectors as negatives, as in a queue, and saves their
        normalisation. Longer vectors may then overflow to inf.
    own_rows: slice(start, stop) of length N, for in-batch negatives of several ranks. The
        positive of query i is positive_key[start + i], as in MoCo v3's
        `labels = arange(N) + N * rank`. None: all rows.

    Returns the float32 loss, or (loss, rank). Gradients reach all inputs that require a
    gradient, in their own dtypes. No (N, K) tensor is kept for backward. The negatives may be
    overwritten before backward, unless they require a gradient.
    Raises ValueError or TypeError, naming the argument. A second derivative raises RuntimeError.

    MoCo v3 on every rank (the keys carry no gradient):

        keys = k.new_empty(world_size * len(k), k.shape[1])  # (W*N, C)
        torch.distributed.all_gather_into_tensor(keys, k)
        own_rows = slice(rank * len(k), (rank + 1) * len(k))
        loss = info_nce(q, keys, temperature=0.2, own_rows=own_rows)
    """
    # All arguments are checked before anything runs.
    check_matrix("query", query, "(N, C)")
    check_matrix("positive_key", positive_key, "(N, C)" if own_rows is None else "(M, C)")
    if own_rows is None:
        check_same("positive_key", positive_key.shape, "shape of query", query.shape)
    else:
        _check_own_keys(query, positive_key, negative_keys, own_rows)
    check_same("positive_key", positive_key.device, "device of query", query.device)
    if negative_keys is not None:
        check_matrix("negative_keys", negative_keys, "(K, C)")
        check_width("negative_keys", negative_keys, "query", query)
        check_same("negative_keys", negative_keys.device, "device of query", query.device)
    elif len(positive_key) == 1:
        raise ValueError(
            "positive_key must have 2 rows or more without negative_keys, whose other rows are the "
            "negatives: got 1 row, and a loss of 0 that teaches nothing"
        )
    temperature = checked_temperature(temperature, query.device)
    check_reduction(reduction)

    # In-batch: a period of M leaves key i out of the negatives of query i.
    if negative_keys is None:
        positive_key, negative_keys = _own_rows_first(positive_key, own_rows)
        exclude_period = len(negative_keys)
    else:
        exclude_period = 0
    # One sweep over the negatives: loss, and positive rank (N,) or None.
    loss, positive_rank = autograd.info_nce(
        query,
        positive_key,
        negative_keys,
        temperature,
        normalize=normalize,
        normalize_negatives=normalize and not negatives_normalized,
        exclude_period=exclude_period,
        return_rank=return_rank,
        reduction=reduction,
    )
    return loss if positive_rank is None else (loss, positive_rank)


@overload
def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    return_rank: Literal[False] = False,
    own_rows: slice | None = None,
) -> Tensor: ...


@overload
def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    return_rank: Literal[True],
    own_rows: slice | None = None,
) -> tuple[Tensor, Tensor]: ...


def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    return_rank: bool = False,
    own_rows: slice | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, eq. 1).

    The positive of a view is the second view of the same image. All 2N - 2 views of other
    images are negatives.

    z_a, z_b: (N, C), two views of N images, normalised inside. With own_rows: (M, C), the
        views of all ranks.
    temperature: as in `info_nce`.
    reduction: over 2N views, those of z_a first. "mean" or "sum" returns (), "none" (2N,).
    return_rank: also returns how many negatives score above the positive, (2N,) int32, with
        ties as in `info_nce`.
    own_rows: slice(start, stop) of length N, the images that the loss is taken over. Their
        negatives come from all M images. None: all rows.

    Returns the float32 loss, or (loss, rank). Dtypes, gradients and errors as in `info_nce`.

    SimCLR on every rank (the gathered views must carry gradients to their ranks):

        from torch.distributed.nn.functional import all_gather

        own_rows = slice(rank * len(z_a), (rank + 1) * len(z_a))
        all_a, all_b = torch.cat(all_gather(z_a)), torch.cat(all_gather(z_b))  # (W*N, C)
        loss = nt_xent(all_a, all_b, own_rows=own_rows)

    DistributedDataParallel averages gradients over ranks. Parameters then get the gradient of
    the mean loss over the whole batch.
    """
    # All arguments are checked before anything runs.
    check_matrix("z_a", z_a, "(N, C)" if own_rows is None else "(M, C)")
    check_matrix("z_b", z_b, "(N, C)" if own_rows is None else "(M, C)")
    check_same("z_b", z_b.shape, "shape of z_a", z_a.shape)
    check_same("z_b", z_b.device, "device of z_a", z_a.device)
    if own_rows is not None:
        check_rows("own_rows", own_rows, "z_a", len(z_a))
    temperature = checked_temperature(temperature, z_a.device)
    check_reduction(reduction)

    # Rows. The period M leaves out both views of the image: the positive has a term of its own.
    own_a, all_a = _own_rows_first(z_a, own_rows)  # (N, C), (M, C)
    own_b, all_b = _own_rows_first(z_b, own_rows)
    views = torch.cat([all_a, all_b])  # (2M, C)
    if len(own_a) == len(all_a):
        calls = [(views, torch.cat([own_b, own_a]))]
    else:
        # Two calls, because query i must be row i of the period of M images.
        calls = [(own_a, own_b), (own_b, own_a)]
    # (loss, positive_rank) of every call.
    results = [
        autograd.info_nce(
            query,
            positive,
            views,
            temperature,
            normalize=True,
            normalize_negatives=True,
            exclude_period=len(all_a),
            return_rank=return_rank,
            reduction=reduction,
        )
        for query, positive in calls
    ]
    loss = _joined([loss for loss, _ in results], reduction)
    positive_ranks = [ranks for _, ranks in results if ranks is not None]
    return (loss, _joined(positive_ranks, "none")) if positive_ranks else loss


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021, arXiv:2103.00020, fig. 3).

    Takes the mean of two cross entropies: images against texts, and texts against images.

    image_features, text_features: (N, C), not normalised here. CLIP normalises before the loss.
    logit_scale: factor of the dot products, 1 / T (not its logarithm), a float or a 0-d tensor.

    Returns the float32 loss, (). Dtypes, gradients and errors as in `info_nce`.
    """
    check_matrix("image_features", image_features, "(N, C)")
    check_matrix("text_features", text_features, "(N, C)")
    check_same(
        "text_features", text_features.shape, "shape of image_features", image_features.shape
    )
    check_same(
        "text_features", text_features.device, "device of image_features", image_features.device
    )
    scale = checked_temperature(logit_scale, image_features.device, "logit_scale")
    pairs = ((image_features, text_features), (text_features, image_features))
    losses = [
        autograd.info_nce(
            query,
            key,
            key,
            1.0 / scale,
            normalize=False,
            normalize_negatives=False,
            exclude_period=len(query),
            return_rank=False,
            reduction="mean",
        )[0]
        for query, key in pairs
    ]
    return (losses[0] + losses[1]) / 2


def _check_own_keys(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None, own_rows: slice
) -> None:
    """Raises unless own_rows selects a row of positive_key for every query."""
    if negative_keys is not None:
        raise ValueError(
            "own_rows selects in-batch positives: pass no negative_keys beside own_rows"
        )
    check_width("positive_key", positive_key, "query", query)
    check_rows("own_rows", own_rows, "positive_key", len(positive_key))
    check_same("own_rows", own_rows.stop - own_rows.start, "number of queries", len(query))


def _own_rows_first(gathered: Tensor, own_rows: slice | None) -> tuple[Tensor, Tensor]:
    """Returns the own rows (N, C), and all rows (M, C) with the own rows rotated to the front."""
    if own_rows is None or own_rows.stop - own_rows.start == len(gathered):
        return gathered, gathered
    own = gathered[own_rows]
    return own, gathered.roll(-own_rows.start, 0) if own_rows.start else gathered


def _joined(values: list[Tensor], reduction: str) -> Tensor:
    """Joins the losses or ranks of views a and views b, already reduced over N rows."""
    if len(values) == 1:
        return values[0]
    if reduction == "none":
        return torch.cat(values)
    total = values[0] + values[1]
    return total / 2 if reduction == "mean" else total
