"""Optimiser steps on a GPU: SGD, LARS and AdamW, each in one pass over memory.

The pass also updates the moving average of the momentum encoder and the low-precision copies
of the encoders. `mocofast_kernels.cpu_optim` documents the arithmetic, and
`mocofast_kernels.optim_kernels` holds the kernels.

Numbers may be tensors (), read on the device. The first step with a set of tensors uploads a
table. Later steps make no host synchronisation and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mocofast_kernels import cpu_optim
from mocofast_kernels.configs import ALL_REGISTERS, FUSED
from mocofast_kernels.cpu_parts import ParameterRow
from mocofast_kernels.optim_kernels import (
    _adamw_kernel,
    _count_kernel,
    _sgd_kernel,
    _squares_kernel,
    _trust_kernel,
)
from mocofast_kernels.tables import FLOATS, AddressTable, TableCache

BLOCK = 2048  # elements that a program updates: 16 a thread, of up to 7 tensors
PARTIALS = 1024  # partial sums that a program of LARS adds at a time

_tables = TableCache(BLOCK)


def sgd_(
    rows: list[ParameterRow],
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """Makes the step of `cpu_optim.sgd_`, with a launch for every combination of types."""
    plan = _tables.plan([_columns(row, 1) for row in rows], elementwise=6)
    for table in plan.tables:
        _launch_sgd(table, rows, None, lr, momentum, weight_decay, ema_momentum)
    if plan.singly:
        cpu_optim.sgd_(
            [rows[i] for i in plan.singly],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            ema_momentum=ema_momentum,
        )


def lars_(
    rows: list[ParameterRow],
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    trust_coefficient: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """Makes the step of `cpu_optim.lars_`.

    Reads parameters and gradients once more before the step, for their norms. Uses no atomics:
    the order of the sums depends on sizes alone.
    """
    matrices = [row for row in rows if row.grad is not None and row.param.dim() > 1]
    others = [row for row in rows if row.grad is None or row.param.dim() <= 1]
    plan = _tables.plan([_columns(row, 1) for row in matrices], elementwise=6)
    for table in plan.tables:
        count, device = len(table.sizes), table.sizes.device
        squares = torch.empty(len(table.owners), 2, dtype=torch.float32, device=device)
        trust = torch.empty(count, dtype=torch.float32, device=device)
        with torch.cuda.device_of(rows[0].param):
            _squares_kernel[(len(table.owners),)](
                table.addresses,
                table.sizes,
                table.owners,
                squares,
                _argument(weight_decay),
                count,
                **_types(table, "PARAM", "GRAD"),
                WIDE=table.wide,
                BLOCK=BLOCK,
                **FUSED,
            )
            _trust_kernel[(count,)](
                squares,
                table.starts,
                trust,
                _argument(trust_coefficient),
                PARTIALS=PARTIALS,
                **FUSED,
            )
        _launch_sgd(table, matrices, trust, lr, momentum, weight_decay, ema_momentum)
    if plan.singly:
        cpu_optim.lars_(
            [matrices[i] for i in plan.singly],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            ema_momentum=ema_momentum,
        )
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
    """Makes the step of `cpu_optim.adamw_`, with two launches for every combination of types.

    The first launch counts the steps on the device.
    """
    stepping = [row for row in rows if row.grad is not None]
    resting = [row for row in rows if row.grad is None]
    beta1, beta2 = betas
    names = ("PARAM", "GRAD", "TARGET", "SHADOW", "TARGET_SHADOW", "EXP_AVG", "EXP_AVG_SQ")
    plan = _tables.plan([_columns(row, 3) for row in stepping], elementwise=7)
    for table in plan.tables:
        types = _types(table, *names)
        # Without averages, the compiler stops at 64 registers, and spills two in bfloat16.
        options = FUSED if types["TARGET"] is not None else ALL_REGISTERS
        count, device = len(table.sizes), table.sizes.device
        corrections = torch.empty(count, 2, dtype=torch.float32, device=device)
        with torch.cuda.device_of(rows[0].param):
            logs = _log(beta1), _log(beta2)
            _count_kernel[(count,)](table.addresses[7], corrections, *logs, **FUSED)
            _adamw_kernel[(len(table.owners),)](
                table.addresses,
                table.sizes,
                table.owners,
                corrections,
                _argument(lr),
                1.0 - beta1,
                float(beta2),
                1.0 - beta2,
                float(eps),
                _argument(weight_decay),
                _ema_weight_of(ema_momentum),
                count,
                **types,
                WIDE=table.wide,
                BLOCK=BLOCK,
                **options,
            )
    if plan.singly:
        cpu_optim.adamw_(
            [stepping[i] for i in plan.singly],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            ema_momentum=ema_momentum,
        )
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
    """Launches SGD for a table. trust: (rows of the table,) factors of LARS, or None."""
    with torch.cuda.device_of(rows[0].param):
        _sgd_kernel[(len(table.owners),)](
            table.addresses,
            table.sizes,
            table.owners,
            trust,
            _argument(lr),
            _argument(momentum),
            _argument(weight_decay),
            _ema_weight_of(ema_momentum),
            len(table.sizes),
            **_types(table, "PARAM", "GRAD", "TARGET", "SHADOW", "TARGET_SHADOW", "BUFFER"),
            WIDE=table.wide,
            BLOCK=BLOCK,
            **FUSED,
        )


def _columns(row: ParameterRow, states: int) -> tuple[Tensor | None, ...]:
    """Returns the row's tensors in the order of a table's columns, with `states` columns of state.

    State is None for a row without a gradient and for an optimiser without momentum.
    """
    return (*row[:5], *row.state, *[None] * (states - len(row.state)))


def _types(table: AddressTable, *names: str) -> dict[str, Any]:
    """Returns {name: Triton type or None} of the table's first columns."""
    return {
        name: None if dtype is None else FLOATS[dtype] for name, dtype in zip(names, table.dtypes)
    }


def _argument(x: float | Tensor) -> float | Tensor:
    return x if isinstance(x, Tensor) else float(x)


def _ema_weight_of(momentum: float | Tensor) -> float | Tensor:
    """Returns 1 - m in double precision. Returns a tensor m unchanged: the kernel subtracts."""
    return momentum if isinstance(momentum, Tensor) else 1.0 - momentum


def _log(beta: float) -> float:
    """Returns log(beta). For beta = 0 returns -1e4, so that exp(count x log) is 0 as beta^count."""
    return math.log(beta) if beta > 0 else -1e4
