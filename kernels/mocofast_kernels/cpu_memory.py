"""Memory of key features in plain PyTorch, for CPUs and devices without Triton: EMA and enqueue."""

from __future__ import annotations

import torch
from torch import Tensor

from mocofast_kernels.cpu import unit_rows


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, *, normalize: bool) -> None:
    """Writes key i at row (pointer + i) % K of the queue, then advances the pointer by B, modulo K.

    queue: (K, C), a ring buffer.
    pointer: (1,) int64. No host synchronisation.
    keys: (B, C). Where B > K, only the last K keys are written, at the rows of the formula.
    normalize: divide keys by their L2 norms first.
    """
    size, count = len(queue), len(keys)
    kept = min(count, size)
    values, _ = unit_rows(keys[count - kept :], normalize)
    index = (pointer + torch.arange(count - kept, count, device=queue.device)) % size
    queue.index_copy_(0, index, values.to(queue.dtype))
    pointer.add_(count).remainder_(size)


def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: float | Tensor) -> None:
    """Computes t = m t + (1 - m) s in place for all targets t and sources s.

    targets, sources: tensors of equal shapes, pair by pair. Integer tensors are copied. A target
        listed twice (tied weights) is updated once.
    momentum: m, a float or a tensor ().
    """
    if isinstance(momentum, Tensor) and momentum.device.type == "cpu":
        momentum = float(momentum)
    step = 1.0 - momentum
    if isinstance(step, float) and _are_distinct_float32(targets, sources):
        torch._foreach_lerp_(targets, sources, step)
        return
    # Sort out integers, other types and tied tensors.
    plain_targets, plain_sources = [], []
    seen = set()
    for target, source in zip(targets, sources):
        # A tensor without an address (of a wrapper, say) is tied to itself alone.
        address = target.data_ptr() or -id(target)
        identity = (address, target.shape, target.stride(), target.dtype)
        if identity in seen and target.numel():
            continue
        seen.add(identity)
        if not target.is_floating_point():
            target.copy_(source)
        elif target.dtype == source.dtype == torch.float32:
            plain_targets.append(target)
            plain_sources.append(source)
        else:
            wide = torch.promote_types(
                torch.promote_types(target.dtype, source.dtype), torch.float32
            )
            target.copy_(target.to(wide).lerp_(source.to(wide), step))
    if not plain_targets:
        return
    if isinstance(step, float):
        torch._foreach_lerp_(plain_targets, plain_sources, step)
    else:
        for target, source in zip(plain_targets, plain_sources):
            target.lerp_(source, step)


def _are_distinct_float32(targets: list[Tensor], sources: list[Tensor]) -> bool:
    """Returns whether all tensors are float32 and no target is listed twice: the usual case."""
    pointers = {x.data_ptr() for x in targets}
    return len(pointers) == len(targets) and {x.dtype for x in targets + sources} == {torch.float32}
