"""Exponential moving average of many tensors on a GPU, in one launch of a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from mocofast_kernels.configs import FUSED
from mocofast_kernels.cpu_vectors import common_wide_dtype
from mocofast_kernels.tables import FLOATS, TableCache, column, locate

BLOCK = 4096  # elements that a program updates: 32 a thread

_tables = TableCache(BLOCK)


@triton.jit
def _ema_kernel(
    addresses,  # (2, rows) int64: targets, sources
    sizes,  # (rows,) int64
    owners,  # (programs, 2) int32
    momentum,  # pointer to m, or None
    keep_float,  # m and 1 - m, used without a pointer
    take_float,
    tensors,  # rows of the table
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if momentum is None:
        keep, take = keep_float, take_float
    else:
        m = tl.load(momentum)
        keep, take = m.to(tl.float32), (1.0 - m).to(tl.float32)
    owner, offsets, inside = locate(sizes, owners, WIDE, BLOCK)
    target = column(addresses, 0, tensors, owner, TARGET, WIDE)
    source = column(addresses, 1, tensors, owner, SOURCE, WIDE)
    t = tl.load(target + offsets, mask=inside).to(tl.float32)
    s = tl.load(source + offsets, mask=inside).to(tl.float32)
    tl.store(target + offsets, (keep * t + take * s).to(TARGET), mask=inside)


def _update_one(target: Tensor, source: Tensor, momentum: float | Tensor) -> None:
    """Updates one tensor by PyTorch's operations."""
    if not (target.is_floating_point() or target.is_complex()):
        target.copy_(source)
        return
    wide = common_wide_dtype(target.dtype)
    if isinstance(momentum, Tensor):
        keep, take = momentum.to(wide), (1 - momentum).to(wide)
        target.copy_(target.to(wide) * keep + source.to(wide) * take)
    else:
        target.copy_(target.to(wide).mul_(momentum).add_(source.to(wide), alpha=1 - momentum))


@torch.no_grad()
def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: float | Tensor) -> None:
    """Computes t = m t + (1 - m) s in place for all targets t and sources s.

    targets, sources: tensors of equal shapes, pair by pair. Integer tensors are copied. A target
        listed twice (tied weights) is updated once.
    momentum: m, a float (1 - m is computed in double precision), or a tensor () on the same
        device, read on the device.

    Computes in float32 (float64 for a float64 target) and rounds to the target's type.

    Makes a launch for every pair of types, and a second launch where addresses or sizes rule out
    wide loads. PyTorch updates the remaining pairs singly: pairs with gaps or with different
    orders of elements, and types other than float32, bfloat16 and float16.

    The first call with a set of tensors uploads a table and cannot be captured in a CUDA graph.
    Later calls make no host synchronisation and can be captured.
    """
    assert len(targets) == len(sources), (len(targets), len(sources))
    if not targets:
        return
    plan = _tables.plan(list(zip(targets, sources)), elementwise=2)
    for i in plan.singly:
        _update_one(targets[i], sources[i], momentum)
    pointer, keep, take = None, 0.0, 0.0
    if isinstance(momentum, Tensor):
        pointer = momentum
    else:
        keep, take = momentum, 1.0 - momentum
    with torch.cuda.device_of(targets[0]):
        for table in plan.tables:
            target, source = (FLOATS[dtype] for dtype in table.dtypes if dtype is not None)
            _ema_kernel[(len(table.owners),)](
                table.addresses,
                table.sizes,
                table.owners,
                pointer,
                keep,
                take,
                len(table.sizes),
                TARGET=target,
                SOURCE=source,
                WIDE=table.wide,
                BLOCK=BLOCK,
                **FUSED,
            )
    increment_version(targets)
