"""Triton kernels of the optimiser steps. `mocofast_kernels.optim` launches the kernels.

Every kernel reads a table of addresses (`mocofast_kernels.tables`), whose columns are 0 param,
1 grad, 2 target, 3 shadow, 4 target_shadow, then the optimiser's state from 5 on. A type that
is None says that the rows have no such tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mocofast_kernels.tables import column, locate


@triton.jit
def _number(x):
    """Returns the number x, or the number at the pointer x, float32."""
    if isinstance(x, float):  # in the interpreter
        return x
    elif x.dtype.is_ptr():
        return tl.load(x).to(tl.float32)
    else:
        return x


@triton.jit
def _ema_weight(ema_weight):
    """Returns 1 - m, m the momentum of the moving average.

    ema_weight: the number 1 - m, which the host rounded from double, or a pointer to m.
    """
    if isinstance(ema_weight, float):  # in the interpreter
        return ema_weight
    elif ema_weight.dtype.is_ptr():
        return (1.0 - tl.load(ema_weight)).to(tl.float32)
    else:
        return ema_weight


@triton.jit
def _complement_of_power(log_beta, count):
    """Returns 1 - beta^count, float64, since float32 would lose 4 digits of 1 - .999.

    log_beta: log(beta), which may be rounded to float32.
    """
    return 1.0 - tl.exp(count.to(tl.float64) * log_beta)


@triton.jit
def _average_and_copy(
    p,  # updated parameters, float32
    addresses,
    rows,
    owner,
    offsets,
    inside,
    ema_weight,
    PARAM: tl.constexpr,
    TARGET: tl.constexpr,
    SHADOW: tl.constexpr,
    TARGET_SHADOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes the moving average of p, and the low-precision copies of p and of the average."""
    # Average and copy the parameter as it is stored.
    p = p.to(PARAM).to(tl.float32)
    if TARGET is not None:
        weight = _ema_weight(ema_weight)
        target = column(addresses, 2, rows, owner, TARGET, WIDE)
        t = tl.load(target + offsets, mask=inside).to(tl.float32)
        # Exact at both ends: equal tensors stay equal, and momentum 0 copies.
        t = tl.where(weight < 0.5, t + weight * (p - t), p - (1.0 - weight) * (p - t))
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
    addresses,  # (columns, rows) int64
    sizes,  # (rows,) int64
    owners,  # (programs, 2) int32
    trust,  # (rows,) float32: LARS's factor of the update, or None
    lr,
    momentum,
    weight_decay,
    ema_weight,
    rows,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    TARGET: tl.constexpr,
    SHADOW: tl.constexpr,
    TARGET_SHADOW: tl.constexpr,
    BUFFER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    owner, offsets, inside = locate(sizes, owners, WIDE, BLOCK)
    param = column(addresses, 0, rows, owner, PARAM, WIDE)
    p = tl.load(param + offsets, mask=inside).to(tl.float32)
    if GRAD is not None:  # rows without a gradient are only averaged and copied
        grad = column(addresses, 1, rows, owner, GRAD, WIDE)
        d = tl.load(grad + offsets, mask=inside).to(tl.float32)
        d += _number(weight_decay) * p
        if trust is not None:
            d *= tl.load(trust + owner)
        if BUFFER is not None:
            buffer = column(addresses, 5, rows, owner, BUFFER, WIDE)
            d += _number(momentum) * tl.load(buffer + offsets, mask=inside).to(tl.float32)
            tl.store(buffer + offsets, d.to(BUFFER), mask=inside)
        p -= _number(lr) * d
        tl.store(param + offsets, p.to(PARAM), mask=inside)
    _average_and_copy(
        p,
        addresses,
        rows,
        owner,
        offsets,
        inside,
        ema_weight,
        PARAM,
        TARGET,
        SHADOW,
        TARGET_SHADOW,
        WIDE,
    )


@triton.jit
def _squares_kernel(
    addresses,  # (columns, rows) int64
    sizes,  # (rows,) int64
    owners,  # (programs, 2) int32
    squares,  # (programs, 2) float32
    weight_decay,
    rows,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the program's summands of |p|^2 and |g + weight_decay p|^2 to `squares`."""
    owner, offsets, inside = locate(sizes, owners, WIDE, BLOCK)
    param = column(addresses, 0, rows, owner, PARAM, WIDE)
    p = tl.load(param + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = column(addresses, 1, rows, owner, GRAD, WIDE)
    d = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
    d += _number(weight_decay) * p
    tl.store(squares + 2 * tl.program_id(0), tl.sum(p * p, axis=0))
    tl.store(squares + 2 * tl.program_id(0) + 1, tl.sum(d * d, axis=0))


@triton.jit
def _trust_kernel(squares, starts, trust, trust_coefficient, PARTIALS: tl.constexpr):
    """Writes a row's factor to trust, (rows,) float32, from the row's summands in a fixed order."""
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
    """Adds 1 to a row's step count, and writes the bias corrections for the new count.

    corrections: (rows, 2) float32, 1 / (1 - beta1^step) and 1 / sqrt(1 - beta2^step).
    """
    step = tl.load(steps + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    count = tl.load(step) + 1.0
    tl.store(step, count)
    first = _complement_of_power(log_beta1, count)
    second = _complement_of_power(log_beta2, count)
    tl.store(corrections + 2 * tl.program_id(0), (1.0 / first).to(tl.float32))
    tl.store(corrections + 2 * tl.program_id(0) + 1, (1.0 / tl.sqrt(second)).to(tl.float32))


@triton.jit
def _adamw_kernel(
    addresses,  # (columns, rows) int64
    sizes,  # (rows,) int64
    owners,  # (programs, 2) int32
    corrections,  # (rows, 2) float32, written by _count_kernel
    lr,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    ema_weight,
    rows,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    TARGET: tl.constexpr,
    SHADOW: tl.constexpr,
    TARGET_SHADOW: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    _average_and_copy(
        p,
        addresses,
        rows,
        owner,
        offsets,
        inside,
        ema_weight,
        PARAM,
        TARGET,
        SHADOW,
        TARGET_SHADOW,
        WIDE,
    )
