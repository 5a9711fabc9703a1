"""Contrastive losses, EMA and key queue on fused kernels: torch only, importable into any other training code.

CUDA tensors go to Triton kernels, all others to blocked PyTorch; importing this needs neither a GPU nor Triton.
Arguments are checked here, so that nothing is modified by a call that raises.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mocofast.ops import autograd
from mocofast.ops.checks import check_matrix, check_same, checked_temperature

REDUCTIONS = ("mean", "sum", "none")


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
) -> Tensor | tuple[Tensor, Tensor | None]:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4), as MoCo uses it (arXiv:1911.05722, eq. 1):
    loss_i = -log exp(q_i.k_i / T) / (exp(q_i.k_i / T) + sum_j exp(q_i.n_j / T)).

    query, positive_key: (N, C); negative_keys: (K, C), or None for in-batch negatives (row i's negatives are the
        positive keys of all other rows). float32, bfloat16 or float16, mixed if need be; any strides.
    temperature: T > 0, a float or a 0-d tensor (which gets a gradient; its value is checked on the CPU only, as a
        check on CUDA would synchronise the host).
    reduction: "mean" or "sum", giving (), or "none", giving (N,).
    normalize: divide all three by their L2 norms over C, inside the kernel.
    return_rank: also return (N,) int32, how many negatives score above the positive: Acc@k is mean(rank < k).
    negatives_normalized: with `normalize`, promise that the negatives are unit vectors already, as a queue's are.
        Longer vectors may then overflow to inf.

    Returns the float32 loss, or (loss, rank). Gradients reach whichever of the inputs require them, in their own
    dtypes; no N x K array is kept. The negatives may be overwritten before `backward` unless they need a gradient.
    Raises ValueError or TypeError naming the argument. There is no second derivative: asking for it raises.
    """
    check_matrix("query", query, "(N, C)")
    check_matrix("positive_key", positive_key, "(N, C)")
    check_same("positive_key", positive_key.shape, "shape of query", query.shape)
    check_same("positive_key", positive_key.device, "device of query", query.device)
    if negative_keys is not None:
        check_matrix("negative_keys", negative_keys, "(K, C)")
        check_same(
            "negative_keys", negative_keys.shape[1], "second dimension of query", query.shape[1]
        )
        check_same("negative_keys", negative_keys.device, "device of query", query.device)
    temperature = checked_temperature(temperature, query.device)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}: got {reduction!r}")
    in_batch = negative_keys is None
    loss, rank = autograd.info_nce(
        query,
        positive_key,
        positive_key if negative_keys is None else negative_keys,
        temperature,
        normalize=normalize,
        normalize_negatives=normalize and (in_batch or not negatives_normalized),
        exclude_period=len(query) if in_batch else 0,
        return_rank=return_rank,
        reduction=reduction,
    )
    return (loss, rank) if return_rank else loss


def nt_xent(
    z_a: Tensor, z_b: Tensor, *, temperature: float | Tensor = 0.5, reduction: str = "mean"
) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020, arXiv:2002.05709, eq. 1): each of the 2N views against the 2N - 2 others.

    z_a, z_b: (N, C), two views of the same N images; normalised inside. Dtypes, errors and temperature as in
    `info_nce`. reduction: over the 2N views, those of z_a first. Returns float32, () or (2N,).
    """
    check_matrix("z_a", z_a, "(N, C)")
    check_matrix("z_b", z_b, "(N, C)")
    check_same("z_b", z_b.shape, "shape of z_a", z_a.shape)
    check_same("z_b", z_b.device, "device of z_a", z_a.device)
    temperature = checked_temperature(temperature, z_a.device)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}: got {reduction!r}")
    views = torch.cat([z_a, z_b])
    loss, _ = autograd.info_nce(
        views,
        torch.cat([z_b, z_a]),
        views,
        temperature,
        normalize=True,
        normalize_negatives=True,
        exclude_period=len(
            z_a
        ),  # leaves out the view itself and its positive, which has its own term
        return_rank=False,
        reduction=reduction,
    )
    return loss


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
