"""Exponential moving average of many tensors in one launch, on a GPU, by Triton.

A table on the device holds where the tensors of one pair of types lie. It is built when a set of storages is first
met and found again by their addresses: a storage that was replaced gets a new table, never a write to where it was.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements a program updates: 32 a thread
PLANS = 16  # sets of tensors remembered
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _ema_kernel(
    addresses, sizes, owners, momentum, keep_float, take_float, tensors, TARGET: tl.constexpr, SOURCE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if momentum is None:
        keep, take = keep_float, take_float
    else:
        m = tl.load(momentum)
        keep, take = m.to(tl.float32), (1.0 - m).to(tl.float32)
    owner = tl.load(owners + 2 * tl.program_id(0))
    offsets = tl.load(owners + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tl.load(sizes + owner)
    target = tl.load(addresses + owner).to(tl.pointer_type(TARGET))
    source = tl.load(addresses + tensors + owner).to(tl.pointer_type(SOURCE))
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        source = tl.multiple_of(source, 16)
    t = tl.load(target + offsets, mask=inside).to(tl.float32)
    s = tl.load(source + offsets, mask=inside).to(tl.float32)
    tl.store(target + offsets, (keep * t + take * s).to(TARGET), mask=inside)


class _Table(NamedTuple):
    """Where the n tensors of one pair of types lie, and which part of which each program updates."""

    target_dtype: torch.dtype
    source_dtype: torch.dtype
    addresses: Tensor  # (2 n,) int64: of all targets, then of all sources
    sizes: Tensor  # (n,) int64: elements
    owners: Tensor  # (programs, 2) int32: which tensor, which block of it
    aligned: bool  # every address is a multiple of 16 bytes, so loads may be wide


class _Plan(NamedTuple):
    tables: list[_Table]
    singly: list[int]  # places in the list of pairs that go through PyTorch


_plans: OrderedDict[tuple[object, ...], _Plan] = OrderedDict()


def _table(pairs: list[tuple[Tensor, Tensor]]) -> _Table:
    (target, source), *_ = pairs
    addresses = [t.data_ptr() for t, _ in pairs] + [s.data_ptr() for _, s in pairs]
    sizes = torch.tensor([t.numel() for t, _ in pairs])
    blocks = -(-sizes // BLOCK)
    owners = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    within = torch.arange(len(owners)) - torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
    return _Table(
        target.dtype,
        source.dtype,
        torch.tensor(addresses).to(target.device),
        sizes.to(target.device),
        torch.stack([owners, within], dim=1).int().to(target.device),
        all(address % 16 == 0 for address in addresses),
    )


def _plan(targets: list[Tensor], sources: list[Tensor]) -> _Plan:
    """Who updates what; remembered by everything that the tables hold, addresses first."""
    key = tuple(
        (t.data_ptr(), s.data_ptr(), t.dtype, s.dtype, t.shape, t.stride(), s.stride())
        for t, s in zip(targets, sources)
    )
    if key in _plans:
        _plans.move_to_end(key)
        return _plans[key]
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    singly = []
    seen = set()
    for i, (target, source) in enumerate(zip(targets, sources)):
        identity = (target.data_ptr(), target.dtype, target.shape, target.stride())
        if target.numel() == 0 or identity in seen:
            continue
        seen.add(identity)
        if target.dtype in FLOATS and source.dtype in FLOATS and _is_flat(target, source):
            groups.setdefault((target.dtype, source.dtype), []).append((target, source))
        else:
            singly.append(i)
    plan = _plans[key] = _Plan([_table(pairs) for pairs in groups.values()], singly)
    if len(_plans) > PLANS:
        _plans.popitem(last=False)
    return plan


def _is_flat(t: Tensor, s: Tensor) -> bool:
    """Both fill one stretch of memory each, in the same order of elements (contiguous, channels-last, transposed)."""
    return (
        t.shape == s.shape
        and t.stride() == s.stride()
        and bool(torch.ops.aten.is_non_overlapping_and_dense.default(t))
    )


def _update_one(target: Tensor, source: Tensor, momentum: float | Tensor) -> None:
    if not target.is_floating_point():
        target.copy_(source)
        return
    wide = torch.promote_types(target.dtype, torch.float32)
    if isinstance(momentum, Tensor):
        keep, take = momentum.to(wide), (1 - momentum).to(wide)
        target.copy_(target.to(wide) * keep + source.to(wide) * take)
    else:
        target.copy_(target.to(wide).mul_(momentum).add_(source.to(wide), alpha=1 - momentum))


@torch.no_grad()
def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: float | Tensor) -> None:
    """t = m t + (1 - m) s for each target and source, in place: one launch for each pair of their types.

    Float32 arithmetic, rounded to the target's type (float64 for a float64 target). momentum: a float (1 - m is
    taken in double precision) or a tensor () on the same device, read there. Integer tensors are copied. A target
    that stands in the list twice (tied weights) is updated once. A steady state makes no host synchronisation and can
    be captured in a CUDA graph; the first call with a set of tensors uploads a table and cannot.

    Pairs that are no flat stretches of memory in the same order, and types other than float32, bfloat16 and
    float16, go through PyTorch one by one.
    """
    assert len(targets) == len(sources), (len(targets), len(sources))
    if not targets:
        return
    plan = _plan(targets, sources)
    for i in plan.singly:
        _update_one(targets[i], sources[i], momentum)
    pointer, keep, take = None, 0.0, 0.0
    if isinstance(momentum, Tensor):
        pointer = momentum
    else:
        keep, take = momentum, 1.0 - momentum
    with torch.cuda.device_of(targets[0]):
        for table in plan.tables:
            _ema_kernel[(len(table.owners),)](
                table.addresses, table.sizes, table.owners, pointer, keep, take, len(table.sizes),
                TARGET=FLOATS[table.target_dtype], SOURCE=FLOATS[table.source_dtype], ALIGNED=table.aligned,
                BLOCK=BLOCK,
            )  # fmt: skip
