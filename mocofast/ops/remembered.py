"""Remembers lists of tensors that passed checks: a list of equal properties passes at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

LISTS = 16  # lists of tensors that are remembered
_KINDS = {Tensor, torch.nn.Parameter}


class Seen(NamedTuple):
    """What is known of a list of tensors."""

    device: torch.device  # of all tensors
    is_contiguous_float32: bool  # all tensors are contiguous, of float32
    guard: TensorGuards  # compares the properties of every tensor


class Remembered:
    """Properties of lists of tensors that passed checks.

    Properties are type, dtype, device, shape, strides and requires_grad of every tensor. Every call
    compares them, by the guard that torch.compile has for inputs of compiled code. So tensors that
    were resized, cast or replaced since are checked again. Addresses are no property. No tensor is
    kept alive.
    """

    def __init__(self) -> None:
        self._lists: dict[Any, Seen] = {}

    def find(self, tensors: Sequence[Any]) -> Seen | None:
        """Returns what is known of a list of equal properties, or None.

        A list that holds a tensor twice is never found.
        """
        seen = self._lists.get(_key(tensors))
        return seen if seen is not None and seen.guard.check(*tensors) else None

    def add(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Remembers a list of tensors on a device. A list with other classes is left alone."""
        if not _KINDS.issuperset(map(type, tensors)):
            return
        if len(self._lists) >= LISTS:
            self._lists = {}
        sizes: Any = [list(x.shape) for x in tensors]
        strides: Any = [list(x.stride()) for x in tensors]
        guard = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        plain = all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
        self._lists[_key(tensors)] = Seen(device, plain, guard)


def _key(tensors: Sequence[Any]) -> Any:
    """Returns what tells most lists apart."""
    return len(tensors), getattr(tensors[0], "shape", None) if tensors else None
