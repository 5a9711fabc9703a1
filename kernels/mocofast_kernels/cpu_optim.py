"""Optimiser steps in plain PyTorch, on any device: SGD, LARS and AdamW, each with the moving average of the momentum
encoder and low-precision copies of both encoders. The path of CPUs, and the twin of `mocofast_kernels.optim`.

A step is PyTorch's own fused one, then a moving average, then copies. Cutting the tensors so that the average finds
the parameters in the cache was no faster. With several threads small tensors take foreach operations instead, as the
fused steps wake all threads for every tensor: where they had to wait for busy cores, a step of 80,000 parameters took
170 to 580 ms instead of less than 1. On one thread these operations would cost 3 to 5% of a ResNet-50's step.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mocofast_kernels import cpu

SMALL = 2**15  # elements, the grain of PyTorch's elementwise operations: fewer stay on one thread
CHUNK = 2**20  # elements whose scaled gradients LARS holds at a time, at least one tensor's


class ParameterRow(NamedTuple):
    """A parameter and what is updated with it: tensors of one shape, of any strides and floating types."""

    param: Tensor
    grad: (
        Tensor | None
    )  # without one, the parameter and its state stay; average and copies are made all the same
    target: Tensor | None  # becomes m target + (1 - m) param, after the step
    shadow: Tensor | None  # becomes a copy of param
    target_shadow: Tensor | None  # becomes a copy of target
    state: tuple[
        Tensor, ...
    ]  # (momentum_buffer,), or () without momentum; AdamW: (exp_avg, exp_avg_sq, step)


def sgd_(
    rows: Sequence[ParameterRow],
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """b = momentum b + g + weight_decay p; p = p - lr b: torch.optim.SGD without dampening, b starting from 0.

    Float32 arithmetic (float64 for float64), rounded to what each tensor is stored in. Numbers may be tensors (),
    which are read by the host here.
    """
    lr, momentum, weight_decay = float(lr), float(momentum), float(weight_decay)
    for params, grads, states, small in _dense_groups(rows):
        buffers = [state[0] for state in states if state]
        if small:
            updates = list(torch._foreach_add(grads, params, alpha=weight_decay))
            if buffers:
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, updates)
                updates = buffers
            torch._foreach_add_(params, updates, alpha=-lr)
            continue
        torch._fused_sgd_(
            params,
            grads,
            buffers,
            weight_decay=weight_decay,
            momentum=momentum if buffers else 0.0,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
    _average(rows, ema_momentum)


def lars_(
    rows: Sequence[ParameterRow],
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    trust_coefficient: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """LARS as MoCo v3 has it (You et al. 2017, arXiv:1708.03888): d = g + weight_decay p, scaled by
    trust_coefficient |p| / |d| where both norms are above 0; b = momentum b + d; p = p - lr b.

    Parameters of at most one dimension (biases, norms) are neither decayed nor scaled. Norms are of float32 values.
    """
    chunk: list[ParameterRow] = []
    size = 0
    for i, row in enumerate(rows):
        chunk.append(row)
        size += row.param.numel()
        if size >= CHUNK or i == len(rows) - 1:
            scaled = [_scaled(row, float(weight_decay), float(trust_coefficient)) for row in chunk]
            sgd_(scaled, lr=lr, momentum=momentum, weight_decay=0.0, ema_momentum=ema_momentum)
            chunk, size = [], 0


def adamw_(
    rows: Sequence[ParameterRow],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); a row's step, a float32 tensor (), counts
    first."""
    lr, weight_decay, (beta1, beta2) = float(lr), float(weight_decay), betas
    for params, grads, states, small in _dense_groups(rows):
        exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*states))
        torch._foreach_add_(steps, 1)
        if small:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
            torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
            torch._foreach_mul_(exp_avg_sqs, beta2)
            torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
            counts = [step.item() for step in steps]
            divisors = torch._foreach_sqrt(exp_avg_sqs)
            torch._foreach_div_(divisors, [math.sqrt(1 - beta2**count) for count in counts])
            torch._foreach_add_(divisors, eps)
            torch._foreach_addcdiv_(
                params, exp_avgs, divisors, [-lr / (1 - beta1**count) for count in counts]
            )
            continue
        torch._fused_adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
    _average(rows, ema_momentum)


def _scaled(row: ParameterRow, weight_decay: float, trust_coefficient: float) -> ParameterRow:
    """The row with LARS's update in the place of its gradient."""
    if row.grad is None or row.param.dim() <= 1:
        return row
    wide = torch.promote_types(row.param.dtype, torch.float32)
    param, update = row.param.to(wide), row.grad.to(wide)
    update = torch.add(update, param, alpha=weight_decay)
    p_norm, d_norm = torch.linalg.vector_norm(param), torch.linalg.vector_norm(update)
    trust = torch.where((p_norm > 0) & (d_norm > 0), trust_coefficient * p_norm / d_norm, 1.0)
    return row._replace(grad=update.mul_(trust))


def _average(rows: Sequence[ParameterRow], momentum: float | Tensor) -> None:
    averaged = [row for row in rows if row.target is not None]
    if averaged:
        cpu.ema_update_([row.target for row in averaged], [row.param for row in averaged], momentum)  # type: ignore[misc]
    copies = [(row.shadow, row.param) for row in rows if row.shadow is not None]
    copies += [(row.target_shadow, row.target) for row in rows if row.target_shadow is not None]  # type: ignore[misc]
    if copies:
        torch._foreach_copy_([copy for copy, _ in copies], [source for _, source in copies])


class _Group(NamedTuple):
    """Rows with gradients, of one type (float32 or float64) and one device, all with state or all without."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[tuple[Tensor, ...]]
    small: bool


def _dense_groups(rows: Sequence[ParameterRow]) -> Iterator[_Group]:
    """Rows with gradients, fit for PyTorch's fused steps.

    These go through memory in its order, and on CPUs that of SGD is wrong in 16 bits (2.11: off by tenths of a unit).
    So rows of other types, or with tensors stored in different orders, are exchanged for copies, and what the step
    makes of these is written back after it.
    """
    least = SMALL if torch.get_num_threads() > 1 else 0
    groups: dict[Hashable, _Group] = {}
    lent: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
    for param, grad, _, _, _, state in rows:
        if grad is None or param.numel() == 0:
            continue
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        small = param.device.type == "cpu" and param.numel() < least
        key: Hashable = (wide, param.device, len(state), small)
        tensors = (param, grad, *state[:2])
        if any(t.dtype != wide for t in tensors) or not same_layout(tensors):
            copies = [t.to(wide, copy=True, memory_format=torch.contiguous_format) for t in tensors]
            lent.setdefault(key, []).extend([(param, copies[0]), *zip(state, copies[2:])])
            param, grad, state = copies[0], copies[1], (*copies[2:], *state[2:])
        group = groups.setdefault(key, _Group([], [], [], small))
        group.params.append(param)
        group.grads.append(grad)
        group.states.append(state)
    for key, group in groups.items():
        yield group
        for original, copy in lent.get(key, ()):
            original.copy_(copy)


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether all have one shape and each fills one stretch of memory, in the same order of elements (contiguous,
    channels-last, transposed)."""
    first, *others = tensors
    shape, stride = first.shape, first.stride()
    for t in others:
        if t.shape != shape or (t.stride() != stride and _order(t) != _order(first)):
            return False
    return first.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(first))


def _order(t: Tensor) -> list[int]:
    """Strides; that of a dimension of size 1 says nothing, and 1x1 convolutions have two ways to write it."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size != 1]
