"""Eager PyTorch formulas of MoCo's paper (algorithm 1): the baseline of the benchmarks.

Autograd differentiates the formulas. The whole array of logits, (N, 1 + K), is in memory.
Does not import Triton.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    normalize: bool = True,
    normalize_negatives: bool = False,
) -> Tensor:
    """Returns the mean InfoNCE loss, shape () (He et al. 2020, arXiv:1911.05722, eq. 1).

    query, positive: (N, C).
    negatives: (K, C).
    temperature: divides the logits.
    normalize: divide rows of query and positive by their L2 norm.
    normalize_negatives: divide rows of negatives by their L2 norm.
    """
    if normalize:
        query, positive = F.normalize(query, dim=1), F.normalize(positive, dim=1)
    if normalize_negatives:
        negatives = F.normalize(negatives, dim=1)
    positive_logits = (query * positive).sum(1, keepdim=True)  # (N, 1)
    negative_logits = query @ negatives.t()  # (N, K)
    logits = torch.cat([positive_logits, negative_logits], dim=1) / temperature
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float) -> None:
    """Sets t = m t + (1 - m) s, one tensor after another (arXiv:1911.05722, eq. 2)."""
    for target, source in zip(targets, sources):
        target.copy_(target * momentum + source * (1.0 - momentum))


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool = True) -> None:
    """Writes keys into the ring buffer and advances the pointer.

    queue: (K, C). K must be a multiple of B, else ValueError.
    pointer: (1,), the row of the oldest key.
    keys: (B, C).
    normalize: divide rows of keys by their L2 norm.
    """
    if len(queue) % len(keys):
        raise ValueError(
            f"queue must hold a multiple of the {len(keys)} keys: got {len(queue)} rows"
        )
    start = int(pointer)
    queue[start : start + len(keys)] = F.normalize(keys, dim=1) if normalize else keys
    pointer[0] = (start + len(keys)) % len(queue)
