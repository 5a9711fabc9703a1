"""Optimiser steps in plain PyTorch, on any device: SGD, LARS and AdamW.

A step also updates the moving average of the momentum encoder and the low-precision copies of
the encoders. CPUs take this path. `mocofast_kernels.optim` computes the same on GPUs.

Compiled loops take SGD and AdamW of float32 tensors, where they are installed (`cpu_steps`). The
rest follows here. The tensors are divided into parts that fit the cache. On a part PyTorch's fused
step comes first, then the moving average, then the copies. Average and copies find the values in
the cache: a step of SGD takes .85 of the time of the same operations on whole tensors. A thread
takes whole parts alone (`cpu_threads`), since PyTorch's fused steps wake all threads for every
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mocofast_kernels import cpu_memory, cpu_steps, cpu_threads
from mocofast_kernels.cpu_parts import ParameterRow, in_parts, part_size, same_layout, slices
from mocofast_kernels.cpu_steps import Rule


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
    rule = Rule(lr=float(lr), weight_decay=float(weight_decay), momentum=float(momentum))
    rows = cpu_steps.step_(rows, rule, ema_momentum)
    step = _sgd(rule.lr, rule.momentum, rule.weight_decay)
    _in_parts(rows, lambda part: _update(part, step, ema_momentum), sliced=True)


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
    step, decay, trust = (
        _sgd(float(lr), float(momentum), 0.0),
        float(weight_decay),
        trust_coefficient,
    )

    def update(part: list[ParameterRow]) -> None:
        _update([_scaled(row, decay, float(trust)) for row in part], step, ema_momentum)

    _in_parts(rows, update, sliced=False)  # the norms are of whole tensors


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
    rate, decay, (beta1, beta2) = float(lr), float(weight_decay), betas
    steps = [row.state[2] for row in rows if row.grad is not None and row.param.numel()]
    if steps:
        torch._foreach_add_(steps, 1)
    rule = Rule(True, rate, decay, beta1=beta1, beta2=beta2, eps=eps)
    rows = cpu_steps.step_(rows, rule, ema_momentum)

    def step(group: _Group) -> None:
        exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*group.states))
        torch._fused_adamw_(
            group.params,
            group.grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    _in_parts(rows, lambda part: _update(part, step, ema_momentum), sliced=True)


def _in_parts(
    rows: Sequence[ParameterRow], update: Callable[[list[ParameterRow]], None], sliced: bool
) -> None:
    """Calls update(part) for all parts of the rows.

    sliced: large tensors are divided, too.
    """
    if rows:
        _fork(rows[0].param, rows, update, sliced)


@cpu_threads.one_fork(unless=lambda *_: False)
def _fork(
    first: Tensor,
    rows: Sequence[ParameterRow],
    update: Callable[[list[ParameterRow]], None],
    sliced: bool,
) -> None:
    size = part_size(sum(row.param.numel() for row in rows))
    pieces = [piece for row in rows for piece in _pieces(row, size)] if sliced else rows
    parts = in_parts(pieces, lambda row: row.param.numel(), size)
    cpu_threads.in_order(update, parts, lambda part, result: None)


def _pieces(row: ParameterRow, size: int) -> list[ParameterRow]:
    """Returns slices of a row, of `size` elements at most. A step count stays whole."""
    if row.param.numel() <= size:
        return [row]
    buffers, counts = row.state[:2], row.state[2:]
    return [
        ParameterRow(*tensors[:5], (*tensors[5:], *counts))  # type: ignore[call-arg, arg-type]
        for tensors in slices([*row[:5], *buffers], size)
    ]


def _update(
    rows: list[ParameterRow], step: Callable[[_Group], None], ema_momentum: float | Tensor
) -> None:
    """Makes the step of the parameters, then averages, then copies."""
    for group in _dense_groups(rows):
        step(group)
    _average(rows, ema_momentum)


def _sgd(lr: float, momentum: float, weight_decay: float) -> Callable[[_Group], None]:
    def step(group: _Group) -> None:
        buffers = [state[0] for state in group.states if state]
        torch._fused_sgd_(
            group.params,
            group.grads,
            buffers,
            weight_decay=weight_decay,
            momentum=momentum if buffers else 0.0,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    return step


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


def _dense_groups(rows: Sequence[ParameterRow]) -> Iterator[_Group]:
    """Yields groups of rows with gradients that fit PyTorch's fused steps.

    Fused steps go through tensors in the order of memory. On CPUs the fused SGD step is wrong in
    16 bits (PyTorch 2.11: off by tenths of a unit). So rows of types other than float32 and
    float64, and rows with different orders of elements, are replaced by copies. After the step
    on a group, the copies are written back.
    """
    groups: dict[Hashable, _Group] = {}
    write_back: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}  # (original, copy)
    for param, grad, _, _, _, state in rows:
        if grad is None or param.numel() == 0:
            continue
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        key: Hashable = (wide, param.device, len(state))
        tensors = (param, grad, *state[:2])
        if {t.dtype for t in tensors} != {wide} or not (
            all(map(Tensor.is_contiguous, tensors)) or same_layout(tensors)
        ):
            copies = [t.to(wide, copy=True, memory_format=torch.contiguous_format) for t in tensors]
            write_back.setdefault(key, []).extend([(param, copies[0]), *zip(state, copies[2:])])
            param, grad, state = copies[0], copies[1], (*copies[2:], *state[2:])
        group = groups.setdefault(key, _Group([], [], []))
        group.params.append(param)
        group.grads.append(grad)
        group.states.append(state)
    for key, group in groups.items():
        yield group
        for original, copy in write_back.get(key, ()):
            original.copy_(copy)
