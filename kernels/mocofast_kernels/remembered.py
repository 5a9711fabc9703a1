"""Remembers what was found out about lists of tensors, for lists of equal properties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

LISTS = 16  # lists of tensors that are remembered
KINDS = {Tensor, torch.nn.Parameter}

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """A value for every list of tensors, which depends on properties of the tensors alone.

    Properties are type, dtype, device, shape, strides and requires_grad of every tensor. Every call
    compares them, by the guard that torch.compile has for inputs of compiled code. So tensors that
    were resized, cast or replaced since are looked at again. Addresses are no property. No tensor
    is kept alive.
    """

    def __init__(self) -> None:
        self._lists: dict[Any, tuple[TensorGuards, Value]] = {}

    def find(self, tensors: Sequence[Any], kind: Any = None) -> Value | None:
        """Returns the value of a list of equal properties and of equal kind, or None.

        A list that holds a tensor twice is never found.
        """
        guard, value = self._lists.get(_key(tensors, kind), (None, None))
        return value if guard is not None and guard.check(*tensors) else None

    def add(self, tensors: Sequence[Tensor], value: Value, kind: Any = None) -> None:
        """Remembers the value of a list. A list with other classes of tensors is left alone."""
        if not KINDS.issuperset(map(type, tensors)):
            return
        if len(self._lists) >= LISTS:
            self._lists = {}
        sizes: Any = [list(x.shape) for x in tensors]
        strides: Any = [list(x.stride()) for x in tensors]
        guard = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._lists[_key(tensors, kind)] = (guard, value)


def _key(tensors: Sequence[Any], kind: Any) -> Any:
    """Returns what tells most lists apart."""
    return kind, len(tensors), getattr(tensors[0], "shape", None) if tensors else None
