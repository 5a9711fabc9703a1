"""Memory of key features in plain PyTorch, for CPUs and devices without Triton: EMA and enqueue."""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mocofast_kernels.cpu_parts import check_memory
from mocofast_kernels.cpu_vectors import common_wide_dtype, unit_rows

GRAIN = 2**15  # elements: PyTorch's elementwise operations divide larger tensors among threads


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

    Raises ValueError for a tensor whose storage was freed or made smaller, where PyTorch would
    write past its end.
    """
    if isinstance(momentum, Tensor) and momentum.device.type == "cpu":
        momentum = float(momentum)
    step = 1.0 - momentum
    both = sources + targets
    apart = set(map(Tensor.data_ptr, both))
    check_memory(targets=targets, sources=sources)
    if (
        len(apart) == len(both)  # nothing is tied
        and isinstance(step, float)
        and {x.dtype for x in both} == {torch.float32}
    ):
        _lerp(targets, sources, step)
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
        if not (target.is_floating_point() or target.is_complex()):
            target.copy_(source)
        elif target.dtype == source.dtype == torch.float32:
            plain_targets.append(target)
            plain_sources.append(source)
        else:
            wide = common_wide_dtype(target.dtype, source.dtype)
            target.copy_(target.to(wide).lerp_(source.to(wide), step))
    if not plain_targets:
        return
    if isinstance(step, float):
        _lerp(plain_targets, plain_sources, step)
    else:
        for target, source in zip(plain_targets, plain_sources):
            target.lerp_(source, step)


def _lerp(targets: list[Tensor], sources: list[Tensor], step: float) -> None:
    """Computes t = t + step (s - t), float32.

    For steps below 1/2, `lerp` computes t - step (t - s). A fused step of SGD with gradient -s and
    weight decay 1 computes the same to the bit, without an iterator for every tensor. The fused
    step goes through memory in order, and wakes all threads for every tensor. So `lerp`, which
    wakes no thread for a small tensor, takes small tensors where there are threads.

    The last tensor comes first: a step of an optimiser has left the last weights in the cache.
    """
    targets, sources = targets[::-1], sources[::-1]
    if (
        step >= 0.5
        or targets[0].device.type != "cpu"
        or not all(map(Tensor.is_contiguous, targets + sources))
    ):
        torch._foreach_lerp_(targets, sources, step)
        return
    if torch.get_num_threads() > 1:
        small = [target.numel() <= GRAIN for target in targets]
        if any(small):
            few = list(compress(targets, small)), list(compress(sources, small))
            torch._foreach_lerp_(*few, step)
            large = [not is_small for is_small in small]
            targets, sources = list(compress(targets, large)), list(compress(sources, large))
    if targets:
        torch._fused_sgd_(
            targets,
            sources,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=step,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
        )
        if not torch.compiler.is_compiling():
            increment_version(targets)  # as `lerp` does, and the fused step does not
