"""Losses whose negatives are the other rows of the batch, of this rank or of all ranks."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from mocofast_kernels.cpu_vectors import wide_dtype
from mocofast_kernels.exclusion import Exclusion
from torch import Tensor

from mocofast.ops import autograd, sigmoid
from mocofast.ops.checks import (
    check_features,
    check_reduction,
    check_rows,
    check_same,
    checked_number,
    checked_temperature,
)
from mocofast.ops.in_batch import small_loss, small_sigmoid
from mocofast.ops.losses import own_rows_first
from mocofast.ops.ring import Ring, ring_of
from mocofast.ops.ring import info_nce as ring_loss
from mocofast.ops.sweep import reduced


@overload
def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    return_rank: Literal[False] = False,
    own_rows: slice | None = None,
    group: dist.ProcessGroup | None = None,
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
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]: ...


def nt_xent(
    z_a: Tensor,
    z_b: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    return_rank: bool = False,
    own_rows: slice | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, eq. 1).

    The positive of a view is the second view of the same image. All 2N - 2 views of other
    images are negatives.

    z_a, z_b: (N, C), two views of N images, normalised inside. With own_rows: (M, C), the
        views of all ranks. A single image has no negatives: the loss is 0 for
        any features.
    temperature: as in `info_nce`.
    reduction: over 2N views, those of z_a first. "mean" or "sum" returns (), "none" (2N,).
    return_rank: also returns how many negatives score above the positive, (2N,) int32, with
        ties as in `info_nce`.
    own_rows: slice(start, stop) of length N, the images that the loss is taken over. Their
        negatives come from all M images. None: all rows.

    group: ranks whose views are negatives too, for example torch.distributed.group.WORLD. Pass the
        views of this rank alone: blocks of views go around a ring of ranks, so memory grows with
        N and not with the number of ranks. The loss is that of this rank's 2N views, as with
        own_rows. Every rank of the group calls the loss, and its backward pass.

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
    shape = "(N, C)" if own_rows is None else "(M, C)"
    check_features("z_a", z_a, shape)
    check_features("z_b", z_b, shape, z_a)
    check_same("z_b", z_b.shape, "shape of z_a", z_a.shape)
    if own_rows is not None:
        check_rows("own_rows", own_rows, "z_a", len(z_a))
    temperature = checked_temperature(temperature, z_a.device)
    check_reduction(reduction)
    if group is not None:
        if own_rows is not None:
            raise ValueError(
                "group sends the views of this rank around a ring, and own_rows expects the views "
                "of all ranks: pass one of them"
            )
        ring = ring_of(group, z_a=z_a, z_b=z_b)
        views = torch.cat([z_a, z_b])
        losses, positive_rank = ring_loss(
            views,
            torch.cat([z_b, z_a]),
            views,
            temperature,
            ring,
            normalize=True,
            return_rank=return_rank,
        )
        loss = reduced(losses, reduction)
        return loss if positive_rank is None else (loss, positive_rank)

    # Rows. The period M leaves out both views of the image: the positive has a term of its own.
    own_a, all_a = own_rows_first(z_a, own_rows)  # (N, C), (M, C)
    own_b, all_b = own_rows_first(z_b, own_rows)
    views = torch.cat([all_a, all_b])  # (2M, C)
    if own_rows is None:
        small = small_loss(
            views,
            None,
            temperature,
            normalize=True,
            inverse=True,
            return_rank=return_rank,
            reduction=reduction,
        )
        if small is not None:
            loss, rank = small
            return loss if rank is None else (loss, rank)
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
            excluded=Exclusion(len(all_a)),
            return_rank=return_rank,
            reduction=reduction,
        )
        for query, positive in calls
    ]
    loss = _joined([loss for loss, _ in results], reduction)
    positive_ranks = [ranks for _, ranks in results if ranks is not None]
    return (loss, _joined(positive_ranks, "none")) if positive_ranks else loss


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021, arXiv:2103.00020, fig. 3).

    Takes the mean of two cross entropies: images against texts, and texts against images.

    image_features, text_features: (N, C), not normalised here. CLIP normalises before the loss.
        A single pair has no negatives: the loss is 0 for any features. (`siglip_loss` trains a
        pair alone, too.)
    logit_scale: factor of the dot products, 1 / T (not its logarithm), a float or a 0-d tensor.
    group: as in `nt_xent`: the features of all ranks are negatives, and the loss is that of this
        rank's N pairs.

    Returns the float32 loss, (). Dtypes, gradients and errors as in `info_nce`.
    """
    _check_pairs(image_features, text_features)
    scale = checked_temperature(logit_scale, image_features.device, "logit_scale")
    pairs = ((image_features, text_features), (text_features, image_features))
    ring = None
    if group is not None:
        ring = ring_of(group, image_features=image_features, text_features=text_features)
    else:
        small = small_loss(*pairs[0], scale, normalize=False, both_ways=True)
        if small is not None:
            return small[0]
    if isinstance(scale, Tensor):  # a reciprocal in 16 bits would be another temperature
        scale = scale.to(torch.promote_types(scale.dtype, wide_dtype(image_features.dtype)))
    losses = []
    for query, key in pairs:
        if ring is not None:
            rows, _ = ring_loss(
                query, key, key, 1.0 / scale, ring, normalize=False, return_rank=False
            )
            losses.append(rows.mean())
            continue
        loss, _ = autograd.info_nce(
            query,
            key,
            key,
            1.0 / scale,
            normalize=False,
            normalize_negatives=False,
            excluded=Exclusion(len(query)),
            return_rank=False,
            reduction="mean",
        )
        losses.append(loss)
    return (losses[0] + losses[1]) / 2


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343, eq. 1).

    loss = -1/N sum_ij log sigmoid(z_ij (t x_i.y_j + b)), where z_ij is 1 for i = j, else -1.

    image_features, text_features: (N, C), not normalised here. SigLIP normalises before the loss.
    logit_scale: t > 0 (not its logarithm), a float or a 0-d tensor. SigLIP starts at 10.
    logit_bias: b, a float or a 0-d tensor. SigLIP starts at -10.
    group: as in `nt_xent`: the texts of all ranks are negatives of this rank's N images.

    Returns the float32 loss, (), without an (N, N) tensor (on a CPU: above 512 rows). Dtypes,
    gradients and errors as in `info_nce`, but autocast does not round the features.
    """
    _check_pairs(image_features, text_features)
    device, dtype = image_features.device, wide_dtype(image_features.dtype)
    scale = checked_temperature(logit_scale, device, "logit_scale")
    bias = checked_number(logit_bias, device, "logit_bias")
    if group is None:
        small = small_sigmoid(image_features, text_features, scale, bias)
        if small is not None:
            return small
        rows = len(image_features)
        ring = Ring(None, 0, [rows], rows)
    else:
        ring = ring_of(group, image_features=image_features, text_features=text_features)
    scale, bias = (torch.as_tensor(x, dtype=dtype, device=device) for x in (scale, bias))
    return sigmoid.siglip(image_features, text_features, scale, bias, ring).mean()


def _check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    check_features("image_features", image_features, "(N, C)")
    check_features("text_features", text_features, "(N, C)", image_features)
    check_same(
        "text_features", text_features.shape, "shape of image_features", image_features.shape
    )


def _joined(values: list[Tensor], reduction: str) -> Tensor:
    """Joins the losses or ranks of views a and views b, already reduced over N rows."""
    if len(values) == 1:
        return values[0]
    if reduction == "none":
        return torch.cat(values)
    total = values[0] + values[1]
    return total / 2 if reduction == "mean" else total
