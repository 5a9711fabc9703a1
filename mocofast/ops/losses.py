"""Contrastive losses, EMA and key queue on fused kernels: torch only, importable into any other training code.

CUDA tensors go to Triton kernels, all others to blocked PyTorch; importing this needs neither a GPU nor Triton.
Arguments are checked here, so that nothing is modified by a call that raises.
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
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4) as MoCo uses it (arXiv:1911.05722, eq. 1).

    loss_i = -log(exp(q_i.k_i / T) / (exp(q_i.k_i / T) + sum_j exp(q_i.n_j / T)))

    query: (N, C), float32, bfloat16 or float16, any strides. Inputs may differ in dtype.
    positive_key: (N, C). With own_rows: (M, C), the keys of all ranks.
    negative_keys: (K, C), or None for in-batch negatives: the negatives of query i are all rows of
        positive_key except its positive.
    temperature: T > 0, a float or a 0-d tensor. A tensor gets a gradient. Its value is checked on the
        CPU only, because a check on CUDA would make the host wait.
    reduction: "mean" or "sum" returns (), "none" returns (N,).
    normalize: divides all inputs by their L2 norms over C, inside the kernel.
    return_rank: also returns, (N,) int32, how many negatives score above the positive.
        Top-k accuracy is the mean of (rank < k).
    negatives_normalized: promises that the negatives are unit vectors already, as in a queue, and saves
        their normalisation. Longer vectors may then overflow to inf.
    own_rows: slice(start, stop) of length N, for in-batch negatives of several ranks. The positive of
        query i is positive_key[start + i], as in MoCo v3's `labels = arange(N) + N * rank`.
        None: all rows.

    Returns the float32 loss, or (loss, rank). Gradients reach every input that requires a gradient, in
    the dtype of the input. No (N, K) tensor is kept for backward. The negatives may be overwritten
    before backward unless they require a gradient. A second derivative raises RuntimeError.
    Raises ValueError or TypeError, naming the argument.

    MoCo v3 on every rank (the keys carry no gradient):

        keys = torch.empty(world_size * len(k), k.shape[1], device=k.device)  # (W*N, C)
        torch.distributed.all_gather_into_tensor(keys, k)
        own_rows = slice(rank * len(k), (rank + 1) * len(k))
        loss = info_nce(q, keys, temperature=0.2, own_rows=own_rows)
    """
    # Arguments: nothing runs before all of them are checked.
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
    temperature = checked_temperature(temperature, query.device)
    check_reduction(reduction)

    # In-batch: key j is no negative of query i where j % period == i.
    if negative_keys is None:
        positive_key, negative_keys = _own_rows_first(positive_key, own_rows)
        exclude_period = len(negative_keys)
    else:
        exclude_period = 0
    loss, rank = autograd.info_nce(
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
    return loss if rank is None else (loss, rank)


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
    """NT-Xent (SimCLR, Chen et al. 2020, arXiv:2002.05709, eq. 1): 2N views, 2N - 2 negatives for each view.

    z_a, z_b: (N, C), two views of the same N images, normalised inside. With own_rows: (M, C), the views
        of all ranks.
    temperature: as in `info_nce`.
    reduction: over the 2N views. "mean" or "sum" returns (), "none" returns (2N,), views of z_a first.
    return_rank: also returns, (2N,) int32, how many negatives score above the positive.
    own_rows: slice(start, stop) of length N, the images whose loss is computed. Their negatives are the
        views of all M images. None: all rows.

    Returns the float32 loss, or (loss, rank). Dtypes, gradients and errors as in `info_nce`.

    SimCLR on every rank (the gathered views must carry gradients to their ranks):

        from torch.distributed.nn.functional import all_gather

        own_rows = slice(rank * len(z_a), (rank + 1) * len(z_a))
        all_a, all_b = torch.cat(all_gather(z_a)), torch.cat(all_gather(z_b))  # (W*N, C)
        loss = nt_xent(all_a, all_b, own_rows=own_rows)

    DistributedDataParallel averages gradients over ranks, so parameters get the gradient of the mean
    loss over the whole batch.
    """
    check_matrix("z_a", z_a, "(N, C)" if own_rows is None else "(M, C)")
    check_matrix("z_b", z_b, "(N, C)" if own_rows is None else "(M, C)")
    check_same("z_b", z_b.shape, "shape of z_a", z_a.shape)
    check_same("z_b", z_b.device, "device of z_a", z_a.device)
    if own_rows is not None:
        check_rows("own_rows", own_rows, "z_a", len(z_a))
    temperature = checked_temperature(temperature, z_a.device)
    check_reduction(reduction)

    own_a, all_a = _own_rows_first(z_a, own_rows)  # (N, C), (M, C)
    own_b, all_b = _own_rows_first(z_b, own_rows)
    views = torch.cat([all_a, all_b])  # (2M, C)
    if len(own_a) == len(all_a):
        calls = [(views, torch.cat([own_b, own_a]))]
    else:
        # Two calls, because query i must be row i of the period of M images.
        calls = [(own_a, own_b), (own_b, own_a)]
    results = [
        autograd.info_nce(
            query,
            positive,
            views,
            temperature,
            normalize=True,
            normalize_negatives=True,
            # Leaves out the view and its positive. The positive has a term of its own.
            exclude_period=len(all_a),
            return_rank=return_rank,
            reduction=reduction,
        )
        for query, positive in calls
    ]
    loss = _joined([loss for loss, _ in results], reduction)
    ranks = [rank for _, rank in results if rank is not None]
    return (loss, _joined(ranks, "none")) if ranks else loss


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021, arXiv:2103.00020, fig. 3): the mean of images against texts and
    texts against images.

    image_features, text_features: (N, C), used as they are: normalise them before, as CLIP does.
    logit_scale: the multiplier of the dot products itself (1 / T, not its logarithm), a float or a 0-d tensor.
    Returns () float32. Dtypes and errors as in `info_nce`.
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
    """Returns the own rows, (N, C), and all rows in an order that begins with the own rows, (M, C)."""
    if own_rows is None or own_rows.stop - own_rows.start == len(gathered):
        return gathered, gathered
    own = gathered[own_rows]
    return own, gathered.roll(-own_rows.start, 0) if own_rows.start else gathered


def _joined(values: list[Tensor], reduction: str) -> Tensor:
    """Joins the losses or ranks of views a and b, each already reduced over N rows."""
    if len(values) == 1:
        return values[0]
    if reduction == "none":
        return torch.cat(values)
    total = values[0] + values[1]
    return total / 2 if reduction == "mean" else total
