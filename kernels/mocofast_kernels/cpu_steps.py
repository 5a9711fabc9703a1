"""Steps of optimisers and moving averages in one pass over memory, by compiled loops (steps.c).

A step with its average and its bfloat16 copies reads and writes every tensor once. PyTorch's
operators take tensors that do not fit, and all tensors where the library is missing.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mocofast_kernels import cpu_threads
from mocofast_kernels.cpu_library import function, is_watched, threads_of_openmp
from mocofast_kernels.cpu_parts import (
    ParameterRow,
    check_memory,
    has_memory,
    part_size,
    same_layout,
)
from mocofast_kernels.remembered import KINDS, Remembered

FEW = 2**18  # elements that a thread takes in less time than a change of threads costs
# The columns of steps.c
NAMES = (
    "params",
    "grads",
    "momentum buffers",
    "second moments",
    "step counts",
    "targets",
    "copies",
    "copies of targets",
)
_PAIRS = 1 << 0 | 1 << 5  # the columns of parameters and targets
_Make = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int,
    *[ctypes.c_double] * 7,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
)


class Rule(NamedTuple):
    """The numbers of a step, in the order of steps.c."""

    is_adamw: bool = False
    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0  # of SGD
    beta1: float = 0.0  # of AdamW, as the next two
    beta2: float = 0.0
    eps: float = 0.0


_NO_STEP = Rule()


def step_(
    rows: Sequence[ParameterRow], rule: Rule, ema_momentum: float | Tensor
) -> Sequence[ParameterRow]:
    """Makes the step, the averages and the copies of rows, and returns the rows left alone.

    rows: as for `cpu_optim.sgd_` and `adamw_`. Step counts are counted already.
    ema_momentum: m of the moving average.

    Rows left alone hold other tensors than float32 (copies: bfloat16) of equal layout on CPUs.
    Raises ValueError for a tensor whose storage was freed or made smaller.
    """
    make = _function()
    if make is None or not rows or not _is_free(rows[0].param):
        return rows
    kinds: dict[Hashable, list[ParameterRow]] = defaultdict(list)
    for row in rows:
        _, grad, target, shadow, target_shadow, state = row
        kinds[
            grad is None, target is None, shadow is None, target_shadow is None, len(state)
        ].append(row)
    average = 1.0 - float(ema_momentum)
    left: list[ParameterRow] = []
    for kind, alike in kinds.items():
        left += _step_alike(make, kind, alike, rule, average)
    return left


class Counts(NamedTuple):
    """Elements of the tensors of a list."""

    each: array[int]  # int64
    total: int

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Counts:
        each = array("q", map(Tensor.numel, tensors))
        return Counts(each, sum(each))


class Pairs:
    """What is known of targets and sources of float32 on CPUs that lie in memory alike."""

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self.counts = Counts.of(targets)
        self.addresses = array("q")  # of the last call: of sources, then of targets


def average_(targets: list[Tensor], both: list[Tensor], pairs: Pairs, step: float) -> bool:
    """Computes t = t + step (s - t) for all targets t and sources s.

    both: all sources, then their targets.
    pairs: of lists of these properties (`Remembered`).

    Returns whether the library could: not for tensors that share memory or lost their memory. With
    one thread the last pair comes first: a step of an optimiser has left the last weights in the
    cache.
    """
    make = _function()
    if make is None or is_watched():
        return False
    addresses = array("q", map(Tensor.data_ptr, both))
    # Most lists hold the tensors of their last call. A storage that loses memory moves.
    if addresses != pairs.addresses:
        if len(set(addresses)) < len(addresses) or not all(map(has_memory, both)):
            return False
        pairs.addresses = addresses
    _run(targets[0], make, addresses, _PAIRS, True, pairs.counts, _NO_STEP, step)
    increment_version(targets)
    return True


@functools.cache
def _function() -> Any:
    return function(_Make, "steps_make")


def _is_free(tensor: Tensor) -> bool:
    """Returns whether the tensor is on a CPU, and nobody must see PyTorch's operators."""
    on_cpu = tensor.device.type == "cpu"
    return on_cpu and not torch.compiler.is_compiling() and not is_watched()


class _Plan(NamedTuple):
    """What is known of rows that hold the same tensors."""

    fits: list[bool]  # rows that the library takes
    counts: Counts  # of these rows
    sizes: list[int]  # bytes of the storages of these rows, at their last step


_plans: Remembered[_Plan] = Remembered()


def _step_alike(
    make: Any, kind: Hashable, rows: list[ParameterRow], rule: Rule, average: float
) -> list[ParameterRow]:
    """Makes the step of rows that hold the same tensors. Returns the rows left alone."""
    columns = _columns(rows)
    tensors = [t for column in columns if column is not None for t in column]
    plan = _plans.find(tensors, kind)
    if plan is None:
        fits = list(map(_fits, rows))
        plan = _Plan(fits, Counts.of([row.param for row in compress(rows, fits)]), [])
        _plans.add(tensors, plan, kind)
    left: list[ParameterRow] = []
    if not all(plan.fits):
        left = [row for row, fits in zip(rows, plan.fits) if not fits]
        rows = list(compress(rows, plan.fits))
        if not rows:
            return left
        columns = _columns(rows)
        tensors = [t for column in columns if column is not None for t in column]
    addresses = array("q", map(Tensor.data_ptr, tensors))
    sizes = _sizes(tensors)
    if sizes != plan.sizes:  # most rows hold the memory of their last step
        check_memory(**{name: x for name, x in zip(NAMES, columns) if x is not None})
        plan.sizes[:] = sizes
    if len(set(addresses)) < len(addresses):  # tensors share memory
        return left + rows
    present = sum(1 << i for i, column in enumerate(columns) if column is not None)
    _run(rows[0].param, make, addresses, present, False, plan.counts, rule, average)
    params, grads, first, second, _, *written = columns
    for column in (params if grads else None, first, second, *written):
        if column is not None:
            increment_version(column)
    return left


def _columns(rows: list[ParameterRow]) -> list[list[Tensor] | None]:
    """Returns the tensors of rows in the columns of steps.c. None: the rows have no such tensor."""
    params, grads, targets, shadows, target_shadows, states = zip(*rows)
    state = [*zip(*states), (None,), (None,), (None,)][:3]
    columns = [params, grads, *state, targets, shadows, target_shadows]
    return [None if column[0] is None else list(column) for column in columns]


def _fits(row: ParameterRow) -> bool:
    """Returns whether the library takes the row."""
    *companions, state = row
    tensors = [t for t in (*companions, *state[:2]) if t is not None]
    copies = {id(row.shadow), id(row.target_shadow)}
    return (
        row.param.numel() > 0
        and (row.target is not None or row.target_shadow is None)
        and all(
            type(t) in KINDS
            and t.device.type == "cpu"
            and t.layout == torch.strided
            and not t.is_neg()
            and t.dtype == (torch.bfloat16 if id(t) in copies else torch.float32)
            for t in (*tensors, *state[2:])
        )
        and all(t.numel() == 1 for t in state[2:])
        and same_layout(tensors)
    )


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    """Returns the bytes of the storages. A tensor that lost memory since a call has another."""
    return list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)))


def _run(
    first: Tensor,
    make: Any,
    addresses: array[int],
    present: int,
    backwards: bool,
    counts: Counts,
    rule: Rule,
    average: float,
) -> None:
    places = counts.each.buffer_info()[0], addresses.buffer_info()[0], len(counts.each)
    threads = torch.get_num_threads()
    team = None if threads == 1 or counts.total <= FEW else threads_of_openmp()
    if team is not None:
        sharing = team, threads, part_size(counts.total, threads)
        make(*places, present, False, 0, counts.total, *rule, average, *sharing)
        return

    def part(start: int, end: int) -> None:
        make(*places, present, backwards, start, end, *rule, average, None, 1, 0)

    _in_parts(first, counts.total, part)


@cpu_threads.one_fork(unless=lambda first, total, part: total <= FEW)
def _in_parts(first: Tensor, total: int, part: Callable[[int, int], None]) -> None:
    """Calls part(start, end) for all elements."""
    if cpu_threads.count() == 1:
        part(0, total)
        return
    size = part_size(total)
    starts = range(0, total, size)
    cpu_threads.in_order(
        lambda start: part(start, min(start + size, total)), starts, lambda start, result: None
    )
