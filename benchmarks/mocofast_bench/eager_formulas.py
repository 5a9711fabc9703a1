"""The same operations as eager PyTorch spells them, as MoCo's paper (algorithm 1) does: the benchmarks' baseline.

Differentiated by autograd, with the whole N x (1 + K) array of logits in memory. No Triton.
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
    """Mean InfoNCE loss, (): query, positive (N, C), negatives (K, C) (He et al. 2020, arXiv:1911.05722, eq. 1)."""
    if normalize:
        query, positive = F.normalize(query, dim=1), F.normalize(positive, dim=1)
    if normalize_negatives:
        negatives = F.normalize(negatives, dim=1)
    positive_logits = (query * positive).sum(1, keepdim=True)  # N x 1
    negative_logits = query @ negatives.t()  # N x K
    logits = torch.cat([positive_logits, negative_logits], dim=1) / temperature
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def ema_update_(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float) -> None:
    """t = m t + (1 - m) s, one tensor after the other (arXiv:1911.05722, eq. 2)."""
    for target, source in zip(targets, sources):
        target.copy_(target * momentum + source * (1.0 - momentum))


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool = True) -> None:
    """Keys (B, C) into the ring buffer queue (K, C) at `pointer` (1,); K must be a multiple of B."""
    if len(queue) % len(keys):
        raise ValueError(
            f"queue must hold a multiple of the {len(keys)} keys: got {len(queue)} rows"
        )
    start = int(pointer)
    queue[start : start + len(keys)] = F.normalize(keys, dim=1) if normalize else keys
    pointer[0] = (start + len(keys)) % len(queue)
