"""Optimiser steps in plain PyTorch, on any device: SGD, LARS and AdamW.

A step also updates the moving average of the momentum encoder and the low-precision copies of
the encoders. CPUs take this path. `mocofast_kernels.optim` computes the same on GPUs.

PyTorch's fused step comes first, then the moving average, then the copies. Smaller pieces
of the tensors, for which the average finds the parameters in the cache, were no faster.

With several threads, small tensors take foreach operations, since a fused step wakes all
threads for every tensor. When threads had to wait for busy cores, a step of 80,000 parameters
took 170 to 580 ms instead of less than 1 ms. On a single thread foreach operations would cost
3 to 5% of a ResNet-50's step.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mocofast_kernels import cpu_memory

SMALL = 2**15  # elements: PyTorch keeps elementwise operations on fewer elements on one thread
CHUNK = 2**20  # elements whose scaled gradients LARS holds at a time, at least a whole tensor


class ParameterRow(NamedTuple):
    """A parameter and the tensors updated with it.

    The tensors have equal shapes, any strides and any floating types.
    """

    param: Tensor
    grad: Tensor | None  # None: param and state stay, average and copies are updated
    target: Tensor | None  # becomes m target + (1 - m) param, after the step
    shadow: Tensor | None  # becomes a copy of param
    target_shadow: Tensor | None  # becomes a copy of target
    # SGD and LARS: (momentum_buffer,), or () without momentum.
    # AdamW: (exp_avg, exp_avg_sq, step), step a float32 tensor ().
    state: tuple[Tensor, ...]


def sgd_(
    rows: Sequence[ParameterRow],
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
) -> None:
    """Makes a step of SGD: b = momentum b + g + weight_decay p, then p = p - lr b.

    Equals torch.optim.SGD without dampening, with b starting from 0.

    rows: parameters p, gradients g, momentum buffers b, and tensors updated with p.
    lr, momentum, weight_decay: floats, or tensors (), which the host reads.
    ema_momentum: m of the moving average, likewise.

    Computes in float32 (float64 for float64 parameters), and rounds to the types of the tensors.
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
    """Makes a step of LARS as in MoCo v3 (You et al. 2017, arXiv:1708.03888).

    d = g + weight_decay p, scaled by trust_coefficient |p| / |d| where |p| and |d| are above 0.
    Then b = momentum b + d and p = p - lr b.

    Parameters of at most one dimension (biases, norms) are neither decayed nor scaled. The norms
    are computed from float32 values. Further arguments: as for `sgd_`.
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
    """Makes a step of torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Adds 1 to the step count of every row with a gradient first. betas and eps are floats.
    Further arguments: as for `sgd_`.
    """
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
    """Returns the row with LARS's update in place of the gradient."""
    if row.grad is None or row.param.dim() <= 1:
        return row
    wide = torch.promote_types(row.param.dtype, torch.float32)
    param, update = row.param.to(wide), row.grad.to(wide)
    update = torch.add(update, param, alpha=weight_decay)
    p_norm, d_norm = torch.linalg.vector_norm(param), torch.linalg.vector_norm(update)
    trust = torch.where((p_norm > 0) & (d_norm > 0), trust_coefficient * p_norm / d_norm, 1.0)
    return row._replace(grad=update.mul_(trust))


def _average(rows: Sequence[ParameterRow], momentum: float | Tensor) -> None:
    """Updates the moving averages, then the low-precision copies."""
    averaged = [row for row in rows if row.target is not None]
    if averaged:
        targets = [row.target for row in averaged]
        sources = [row.param for row in averaged]
        cpu_memory.ema_update_(targets, sources, momentum)  # type: ignore[arg-type]
    copies = [(row.shadow, row.param) for row in rows if row.shadow is not None]
    for row in rows:
        if row.target_shadow is not None:
            assert row.target is not None  # a copy of the average needs the average
            copies.append((row.target_shadow, row.target))
    if copies:
        torch._foreach_copy_([copy for copy, _ in copies], [source for _, source in copies])


class _Group(NamedTuple):
    """Rows with gradients, of equal type (float32 or float64), device and length of state."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[tuple[Tensor, ...]]
    small: bool


def _dense_groups(rows: Sequence[ParameterRow]) -> Iterator[_Group]:
    """Yields groups of rows with gradients that fit PyTorch's fused steps.

    Fused steps go through tensors in the order of memory. On CPUs the fused SGD step is wrong in
    16 bits (PyTorch 2.11: off by tenths of a unit). So rows of types other than float32 and
    float64, and rows with different orders of elements, are replaced by copies. After the step
    on a group, the copies are written back.
    """
    least = SMALL if torch.get_num_threads() > 1 else 0
    groups: dict[Hashable, _Group] = {}
    write_back: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}  # (original, copy)
    for param, grad, _, _, _, state in rows:
        if grad is None or param.numel() == 0:
            continue
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        small = param.device.type == "cpu" and param.numel() < least
        key: Hashable = (wide, param.device, len(state), small)
        tensors = (param, grad, *state[:2])
        if any(t.dtype != wide for t in tensors) or not same_layout(tensors):
            copies = [t.to(wide, copy=True, memory_format=torch.contiguous_format) for t in tensors]
            write_back.setdefault(key, []).extend([(param, copies[0]), *zip(state, copies[2:])])
            param, grad, state = copies[0], copies[1], (*copies[2:], *state[2:])
        group = groups.setdefault(key, _Group([], [], [], small))
        group.params.append(param)
        group.grads.append(grad)
        group.states.append(state)
    for key, group in groups.items():
        yield group
        for original, copy in write_back.get(key, ()):
            original.copy_(copy)


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Returns whether tensors of equal shape fill memory without gaps, in the same order.

    The order may be contiguous, channels-last or transposed.
    """
    first, *others = tensors
    shape, stride = first.shape, first.stride()
    for t in others:
        if t.shape != shape or (t.stride() != stride and _order(t) != _order(first)):
            return False
    return first.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(first))


def _order(t: Tensor) -> list[int]:
    """Returns the strides of dimensions larger than 1.

    The stride of a dimension of size 1 says nothing: 1x1 convolutions have two ways to write it.
    """
    return [stride for size, stride in zip(t.shape, t.stride()) if size != 1]
