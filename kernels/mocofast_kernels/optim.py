"""Optimiser steps on a GPU, by Triton: SGD, LARS and AdamW, each in one pass over memory with the moving average of
the momentum encoder and low-precision copies of both encoders.

The functions are those of `mocofast_kernels.cpu_optim`, which documents the arithmetic. Numbers may be tensors () on
the device, read there; a step whose tensors were met before makes no host synchronisation and can be captured in a
CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mocofast_kernels import cpu_optim
from mocofast_kernels.cpu_optim import ParameterRow
from mocofast_kernels.tables import FLOATS, AddressTable, TableCache, column, locate

BLOCK = 2048  # elements a program updates: 16 a thread of each of up to 7 tensors
PARTIALS = 1024  # partial sums that LARS adds at a time

_tables = TableCache(BLOCK)


@triton.jit
def _number(x):
    """A number that is given itself, or by where it lies in device memory."""
    if isinstance(x, float):  # in the interpreter
        return x
    elif x.dtype.is_ptr():
        return tl.load(x).to(tl.float32)
    else:
        return x


@triton.jit
def _share(take):
    """1 - m: a number is that already, rounded from double by the host; in device memory lies m."""
    if isinstance(take, float):  # in the interpreter
        return take
    elif take.dtype.is_ptr():
        return (1.0 - tl.load(take)).to(tl.float32)
    else:
        return take


@triton.jit
def _complement_of_power(log_beta, count):
    """1 - beta^count, in double: in float32, 4 digits of 1 - .999 would be gone. log_beta itself may be rounded."""
    return 1.0 - tl.exp(count.to(tl.float64) * log_beta)


@triton.jit
def _finish(
    p, addresses, rows, owner, offsets, inside, take, PARAM: tl.constexpr, TARGET: tl.constexpr, SHADOW: tl.constexpr,
    TARGET_SHADOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The moving average of updated parameters p, and the copies."""
    # What is averaged and copied is the parameter as it is stored.
    p = p.to(PARAM).to(tl.float32)
    if TARGET is not None:
        share = _share(take)
        target = column(addresses, 2, rows, owner, TARGET, WIDE)
        t = tl.load(target + offsets, mask=inside).to(tl.float32)
        # Exact at both ends: equal weights stay, and momentum 0 copies.
        t = tl.where(share < 0.5, t + share * (p - t), p - (1.0 - share) * (p - t))
        t = t.to(TARGET)
        tl.store(target + offsets, t, mask=inside)
        if TARGET_SHADOW is not None:
            copy = column(addresses, 4, rows, owner, TARGET_SHADOW, WIDE)
            tl.store(copy + offsets, t.to(tl.float32).to(TARGET_SHADOW), mask=inside)
    if SHADOW is not None:
        copy = column(addresses, 3, rows, owner, SHADOW, WIDE)
        tl.store(copy + offsets, p.to(SHADOW), mask=inside)


@triton.jit
def _sgd_kernel(
    addresses, sizes, owners, trust, lr, momentum, weight_decay, take, rows, PARAM: tl.constexpr, GRAD: tl.constexpr,
    TARGET: tl.constexpr, SHADOW: tl.constexpr, TARGET_SHADOW: tl.constexpr, BUFFER: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    owner, offsets, inside = locate(sizes, owners, WIDE, BLOCK)
    param = column(addresses, 0, rows, owner, PARAM, WIDE)
    p = tl.load(param + offsets, mask=inside).to(tl.float32)
    if GRAD is not None:  # without one there is nothing to do but average and copy
        d = tl.load(column(addresses, 1, rows, owner, GRAD, WIDE) + offsets, mask=inside).to(
            tl.float32
        )
        d += _number(weight_decay) * p
        if trust is not None:
            d *= tl.load(trust + owner)
        if BUFFER is not None:
            buffer = column(addresses, 5, rows, owner, BUFFER, WIDE)
            d += _number(momentum) * tl.load(buffer + offsets, mask=inside).to(tl.float32)
            tl.store(buffer + offsets, d.to(BUFFER), mask=inside)
        p -= _number(lr) * d
        tl.store(param + offsets, p.to(PARAM), mask=inside)
    _finish(
        p, addresses, rows, owner, offsets, inside, take, PARAM, TARGET, SHADOW, TARGET_SHADOW, WIDE
    )


@triton.jit
def _squares_kernel(
    addresses, sizes, owners, squares, weight_decay, rows, PARAM: tl.constexpr, GRAD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's share of |p|^2 and |g + weight_decay p|^2; squares: (programs, 2) float32."""
    owner, offsets, inside = locate(sizes, owners, WIDE, BLOCK)
    p = tl.load(
        column(addresses, 0, rows, owner, PARAM, WIDE) + offsets, mask=inside, other=0.0
    ).to(tl.float32)
    d = tl.load(column(addresses, 1, rows, owner, GRAD, WIDE) + offsets, mask=inside, other=0.0).to(
        tl.float32
    )
    d += _number(weight_decay) * p
    tl.store(squares + 2 * tl.program_id(0), tl.sum(p * p, axis=0))
    tl.store(squares + 2 * tl.program_id(0) + 1, tl.sum(d * d, axis=0))


@triton.jit
def _trust_kernel(squares, starts, trust, trust_coefficient, PARTIALS: tl.constexpr):
    """One row's partial sums, always in the same order, to its scale; trust: (rows,) float32."""
    first = tl.load(starts + tl.program_id(0))
    last = tl.load(starts + tl.program_id(0) + 1)
    lanes = tl.arange(0, PARTIALS)
    p = tl.zeros((PARTIALS,), tl.float32)
    d = tl.zeros((PARTIALS,), tl.float32)
    for i in range(first, last, PARTIALS):
        p += tl.load(squares + 2 * (i + lanes), mask=i + lanes < last, other=0.0)
        d += tl.load(squares + 2 * (i + lanes) + 1, mask=i + lanes < last, other=0.0)
    p_norm = tl.sqrt(tl.sum(p, axis=0))
    d_norm = tl.sqrt(tl.sum(d, axis=0))
    scale = tl.where((p_norm > 0) & (d_norm > 0), _number(trust_coefficient) * p_norm / d_norm, 1.0)
    tl.store(trust + tl.program_id(0), scale)


@triton.jit
def _count_kernel(steps, corrections, log_beta1, log_beta2):
    """A row's step + 1, and with it 1 / (1 - beta1^step) and 1 / sqrt(1 - beta2^step); corrections: (rows, 2)."""
    step = tl.load(steps + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    count = tl.load(step) + 1.0
    tl.store(step, count)
    first = _complement_of_power(log_beta1, count)
    second = _complement_of_power(log_beta2, count)
    tl.store(corrections + 2 * tl.program_id(0), (1.0 / first).to(tl.float32))
    tl.store(corrections + 2 * tl.program_id(0) + 1, (1.0 / tl.sqrt(second)).to(tl.float32))


@triton.jit
def _adamw_kernel(
    addresses, sizes, owners, corrections, lr, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, take, rows,
    PARAM: tl.constexpr, GRAD: tl.constexpr, TARGET: tl.constexpr, SHADOW: tl.constexpr, TARGET_SHADOW: tl.constexpr,
    EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    owner, offsets, inside = locate(sizes, owners, WIDE, BLOCK)
    param = column(addresses, 0, rows, owner, PARAM, WIDE)
    exp_avg = column(addresses, 5, rows, owner, EXP_AVG, WIDE)
    exp_avg_sq = column(addresses, 6, rows, owner, EXP_AVG_SQ, WIDE)
    p = tl.load(param + offsets, mask=inside).to(tl.float32)
    g = tl.load(column(addresses, 1, rows, owner, GRAD, WIDE) + offsets, mask=inside).to(tl.float32)
    m = tl.load(exp_avg + offsets, mask=inside).to(tl.float32)
    v = tl.load(exp_avg_sq + offsets, mask=inside).to(tl.float32)
    rate = _number(lr)
    p -= rate * _number(weight_decay) * p
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    tl.store(exp_avg + offsets, m.to(EXP_AVG), mask=inside)
    tl.store(exp_avg_sq + offsets, v.to(EXP_AVG_SQ), mask=inside)
    first = tl.load(corrections + 2 * owner)
    second = tl.load(corrections + 2 * owner + 1)
    p -= rate * first * m / (tl.sqrt(v) * second + eps)
    tl.store(param + offsets, p.to(PARAM), mask=inside)
    _finish(
        p, addresses, rows, owner, offsets, inside, take, PARAM, TARGET, SHADOW, TARGET_SHADOW, WIDE
    )


def sgd_(
    rows: list[ParameterRow],
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """`cpu_optim.sgd_` in one launch for each combination of types."""
    plan = _tables.plan([_columns(row, 1) for row in rows], elementwise=6)
    for table in plan.tables:
        _launch_sgd(table, rows, None, lr, momentum, weight_decay, ema_momentum)
    if plan.singly:
        cpu_optim.sgd_(
            [rows[i] for i in plan.singly], lr=lr, momentum=momentum, weight_decay=weight_decay,
            ema_momentum=ema_momentum,
        )  # fmt: skip


def lars_(
    rows: list[ParameterRow],
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    trust_coefficient: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """`cpu_optim.lars_`: parameters and gradients are read once more before, for their norms. No atomics: sums are
    taken in an order that depends on sizes alone."""
    matrices = [row for row in rows if row.grad is not None and row.param.dim() > 1]
    others = [row for row in rows if row.grad is None or row.param.dim() <= 1]
    plan = _tables.plan([_columns(row, 1) for row in matrices], elementwise=6)
    for table in plan.tables:
        count, device = len(table.sizes), table.sizes.device
        squares = torch.empty(len(table.owners), 2, device=device)
        trust = torch.empty(count, device=device)
        types = _types(table, "PARAM", "GRAD")
        with torch.cuda.device_of(rows[0].param):
            _squares_kernel[(len(table.owners),)](
                table.addresses, table.sizes, table.owners, squares, _argument(weight_decay), count, **types,
                WIDE=table.wide, BLOCK=BLOCK,
            )  # fmt: skip
            _trust_kernel[(count,)](
                squares, table.starts, trust, _argument(trust_coefficient), PARTIALS=PARTIALS
            )
        _launch_sgd(table, matrices, trust, lr, momentum, weight_decay, ema_momentum)
    if plan.singly:
        cpu_optim.lars_(
            [matrices[i] for i in plan.singly], lr=lr, momentum=momentum, weight_decay=weight_decay,
            trust_coefficient=trust_coefficient, ema_momentum=ema_momentum,
        )  # fmt: skip
    if others:
        sgd_(others, lr=lr, momentum=momentum, weight_decay=0.0, ema_momentum=ema_momentum)


def adamw_(
    rows: list[ParameterRow],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """`cpu_optim.adamw_` in two launches for each combination of types; the first counts steps, on the device."""
    stepping = [row for row in rows if row.grad is not None]
    resting = [row for row in rows if row.grad is None]
    beta1, beta2 = betas
    plan = _tables.plan([_columns(row, 3) for row in stepping], elementwise=7)
    for table in plan.tables:
        count, device = len(table.sizes), table.sizes.device
        corrections = torch.empty(count, 2, device=device)
        types = _types(
            table, "PARAM", "GRAD", "TARGET", "SHADOW", "TARGET_SHADOW", "EXP_AVG", "EXP_AVG_SQ"
        )
        with torch.cuda.device_of(rows[0].param):
            _count_kernel[(count,)](table.addresses[7], corrections, _log(beta1), _log(beta2))
            _adamw_kernel[(len(table.owners),)](
                table.addresses, table.sizes, table.owners, corrections, _argument(lr), 1.0 - beta1, float(beta2),
                1.0 - beta2, float(eps), _argument(weight_decay), _take(ema_momentum), count, **types,
                WIDE=table.wide, BLOCK=BLOCK,
            )  # fmt: skip
    if plan.singly:
        cpu_optim.adamw_(
            [stepping[i] for i in plan.singly], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            ema_momentum=ema_momentum,
        )  # fmt: skip
    if resting:
        sgd_(resting, lr=0.0, momentum=0.0, weight_decay=0.0, ema_momentum=ema_momentum)


def _launch_sgd(
    table: AddressTable,
    rows: list[ParameterRow],
    trust: Tensor | None,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    types = _types(table, "PARAM", "GRAD", "TARGET", "SHADOW", "TARGET_SHADOW", "BUFFER")
    with torch.cuda.device_of(rows[0].param):
        _sgd_kernel[(len(table.owners),)](
            table.addresses, table.sizes, table.owners, trust, _argument(lr), _argument(momentum),
            _argument(weight_decay), _take(ema_momentum), len(table.sizes), **types, WIDE=table.wide, BLOCK=BLOCK,
        )  # fmt: skip


def _columns(row: ParameterRow, states: int) -> tuple[Tensor | None, ...]:
    """A row without a gradient, or an optimiser without momentum, has no state."""
    return (*row[:5], *row.state, *[None] * (states - len(row.state)))


def _types(table: AddressTable, *names: str) -> dict[str, Any]:
    return {
        name: None if dtype is None else FLOATS[dtype] for name, dtype in zip(names, table.dtypes)
    }


def _argument(x: float | Tensor) -> float | Tensor:
    return x if isinstance(x, Tensor) else float(x)


def _take(momentum: float | Tensor) -> float | Tensor:
    """1 - m, in double precision on the host; a tensor is subtracted in its own, by the kernel."""
    return momentum if isinstance(momentum, Tensor) else 1.0 - momentum


def _log(beta: float) -> float:
    """Its logarithm; for beta = 0, something of which every power is 0."""
    return math.log(beta) if beta > 0 else -1e4
