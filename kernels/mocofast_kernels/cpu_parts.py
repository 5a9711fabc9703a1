"""Tensors of an elementwise update, and their division into parts, which threads take in turn.

A part fits the last-level cache, so a second operation on the part finds the values of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mocofast_kernels import cpu_threads

LARGEST = 2**20  # elements of a part. Smaller parts spend their time on starting operations
LEAST = 2**16  # elements of a part, where larger parts would leave threads without work
ALIGNED = 64  # elements. Slices that start at a multiple round as the whole tensor would

Item = TypeVar("Item")


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


def part_size(elements: int, threads: int | None = None) -> int:
    """Returns the elements of a part, for a number of elements in all.

    threads: that share the parts. None: those of `cpu_threads`.
    """
    threads = threads or cpu_threads.count()
    shared = -(-elements // (4 * threads))
    size = LARGEST if threads == 1 else min(LARGEST, max(LEAST, shared))
    return -(-size // ALIGNED) * ALIGNED


def in_parts(items: Iterable[Item], elements: Callable[[Item], int], size: int) -> list[list[Item]]:
    """Returns the items in lists of about `size` elements, in order.

    elements: returns the number of elements of an item.
    """
    parts: list[list[Item]] = []
    room = 0
    for item in items:
        count = elements(item)
        if not parts or count > room:
            parts.append([])
            room = size
        parts[-1].append(item)
        room -= count
    return parts


def slices(tensors: Sequence[Tensor | None], size: int) -> list[tuple[Tensor | None, ...]]:
    """Returns slices of tensors of equal shape: tuples of flat views, of `size` elements at most.

    Tensors whose elements lie in different orders are returned whole. None stays None.
    """
    present = [t for t in tensors if t is not None]
    count = present[0].numel()
    if count <= size or not same_layout(present):
        return [tuple(tensors)]
    return [
        tuple(
            None
            if t is None
            else t.as_strided((min(size, count - start),), (1,), t.storage_offset() + start)
            for t in tensors
        )
        for start in range(0, count, size)
    ]


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


def check_memory(**lists: Sequence[Tensor | None]) -> None:
    """Raises ValueError for a tensor that its storage does not hold, where reading could crash.

    lists: tensors by the name of their list, which the error says.
    """
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if t is not None and not has_memory(t):
                raise ValueError(
                    f"{name}[{i}] must have memory: got a {t.dtype} tensor of shape "
                    f"{tuple(t.shape)} whose storage was freed or made smaller"
                )


def has_memory(t: Tensor) -> bool:
    """Returns whether the storage of a tensor holds all elements. On "meta" nothing is held."""
    if not t.numel() or t.device.type == "meta":
        return True
    elements = t.numel()
    if not t.is_contiguous():
        elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
    end = (t.storage_offset() + elements) * t.itemsize
    return t.data_ptr() != 0 and end <= t.untyped_storage().nbytes()
