"""Supervised contrastive loss: every query has several positives, the rows with its label."""

from __future__ import annotations

import torch
from mocofast_kernels.cpu_vectors import wide
from mocofast_kernels.exclusion import Exclusion
from torch import Tensor
from torch.nn import functional as F

from mocofast.ops import autograd
from mocofast.ops.checks import (
    check_features,
    check_reduction,
    check_several,
    check_width,
    checked_ids,
    checked_temperature,
)
from mocofast.ops.in_batch import small_supervised
from mocofast.ops.sweep import reduced, without_autocast


def supervised_contrastive(
    features: Tensor,
    labels: Tensor | None = None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """Supervised contrastive loss, SupCon (Khosla et al. 2020, arXiv:2004.11362, eq. 2, L_out).

    loss_i = -1/|P(i)| sum_{p in P(i)} log(exp(z_i.z_p / T) / sum_{a != i} exp(z_i.z_a / T))
    where P(i) are the other rows with the label of row i.

    features: (N, C), or (N, V, C) with V views of every sample. float32, bfloat16 or float16, on a
        CPU also float64.
    labels: integers, (N,). None: every sample is a class of its own, which with V = 2 is SimCLR's
        loss.
    keys, key_labels: (K, C) and (K,). Positives and negatives of the features are then these keys,
        for example a queue, and no row is left out.
    temperature: T > 0, as in `info_nce`.
    reduction: "none" returns (N,), or (N, V). A row without positives has the loss 0. "mean" is
        over the rows with positives, "sum" over all.
    normalize: divides all inputs by their L2 norms over C.

    Returns the float32 loss (float64 for float64 inputs). The sums over positives are linear in the
    keys, so classes are summed once, and the sweep of `info_nce` does the rest: no (N, N) tensor
    (on a CPU: above 512 rows). Dtypes, gradients and errors as in `info_nce`.
    """
    # All arguments are checked before anything runs.
    views = isinstance(features, Tensor) and features.dim() == 3
    check_features("features", features, "(N, V, C)" if views else "(N, C)")
    device, rows = features.device, features.shape[:-1]
    temperature = checked_temperature(temperature, device)
    check_reduction(reduction)
    if labels is not None:
        labels = checked_ids("labels", labels, features.shape[:1], device)
    elif keys is None and not views:
        raise ValueError("labels must be given for features (N, C): got None, and no row positive")
    else:
        labels = torch.arange(len(features), device=device)
    if keys is not None:
        check_features("keys", keys, "(K, C)", features)
        check_width("keys", keys, "features", features)
        key_labels = checked_ids("key_labels", key_labels, keys.shape[:1], device)
    elif key_labels is not None:
        raise ValueError("key_labels must come with keys: got no keys")
    else:
        check_several("features without keys", rows.numel())

    own_labels = labels[:, None].expand(rows).flatten() if views else labels
    if keys is None and reduction == "mean":
        small = small_supervised(features.flatten(0, -2), own_labels, temperature, normalize)
        if small is not None:
            return small
    with without_autocast(device.type):
        queries = wide(features.flatten(0, -2))
        others = queries if keys is None else wide(keys)
        if normalize:
            queries = F.normalize(queries, dim=1)
            others = queries if keys is None else F.normalize(others, dim=1)
        other_labels = own_labels if key_labels is None else key_labels
        positive, count = _mean_positives(queries, own_labels, others, other_labels, keys is None)
    if device.type != "cpu":  # half types multiply on matrix units
        queries, others = queries.to(features.dtype), others.to(features.dtype)
    # With the mean of the positives as the positive key, InfoNCE is log(1 + e^d) of the loss d.
    # By Jensen d >= log|P(i)|, so d comes back without cancellation.
    losses, _ = autograd.info_nce(
        queries,
        positive,
        others,
        temperature,
        normalize=False,
        normalize_negatives=False,
        excluded=Exclusion(len(queries) if keys is None else 0),
        return_rank=False,
        reduction="none",
    )
    has_positives = count > 0
    losses = torch.where(has_positives, losses, 1.0)  # any number above 0, without a gradient
    losses = losses + torch.log(-torch.expm1(-losses))
    losses = torch.where(has_positives, losses, 0.0)
    if reduction == "mean":
        return losses.sum() / has_positives.sum().clamp_min(1)
    return reduced(losses, reduction).view(rows if reduction == "none" else ())


def _mean_positives(
    queries: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, leave_out_self: bool
) -> tuple[Tensor, Tensor]:
    """Returns the mean of every query's positives, (N, C), 0 without positives, and counts (N,).

    leave_out_self: the keys are the queries, and query i is no positive of its own.
    """
    # Numbers of the classes, without a wait of the host: sort, and count the changes.
    every = torch.cat([key_labels, labels])
    values, order = every.sort()
    numbers = torch.zeros_like(every)
    numbers[order[1:]] = (values[1:] != values[:-1]).cumsum(0)
    of_keys, of_queries = numbers.split([len(key_labels), len(labels)])
    sums = keys.new_zeros(len(every), keys.shape[1]).index_add(0, of_keys, keys)[of_queries]
    ones = keys.new_ones(len(keys))
    count = keys.new_zeros(len(every)).index_add(0, of_keys, ones)[of_queries]
    if leave_out_self:
        sums, count = sums - queries, count - 1
    return sums / count.clamp_min(1)[:, None], count
