"""Plain tensors of a rank: the local parts of sharded tensors (FSDP2's DTensor)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_OWN_DISPATCH = Tensor.__torch_dispatch__


def is_plain(tensors: Sequence[Any]) -> bool:
    """Returns whether no tensor is a wrapper, whose numbers stand in other tensors."""
    kinds = set(map(type, tensors))
    return kinds.issubset(_PLAIN) or not any(map(_is_wrapper, kinds))


def local_tensor(name: str, tensor: Any) -> Any:
    """Returns this rank's part of a DTensor, which shares its memory, and other tensors unchanged.

    name: the argument, for errors.
    Raises TypeError, naming the type, for other wrappers, and ValueError for a DTensor whose parts
    still have to be summed over ranks.
    """
    if not _is_wrapper(type(tensor)):
        return tensor
    if not is_dtensor(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, a wrapper without memory of its own; "
            "expected plain tensors, or DTensors of torch.distributed"
        )
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name} must be a DTensor with its values: got placements "
            f"{tensor.placements}, which still have to be summed over ranks (redistribute)"
        )
    return tensor.to_local()


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns the whole of a DTensor, a collective call, and other tensors unchanged."""
    sharded: Any = tensor if is_dtensor(tensor) else None
    return tensor if sharded is None else sharded.full_tensor()


def check_sharded_alike(name: str, tensor: Any, of: str, expected: Any) -> None:
    """Raises ValueError unless both tensors are plain, or DTensors with equal placements."""
    got, wanted = _placed(tensor), _placed(expected)
    if got != wanted:
        raise ValueError(f"{name} must be sharded as {of}: got {got[0]}, expected {wanted[0]}")


def is_dtensor(tensor: Any) -> bool:
    """Returns whether the tensor is a DTensor, without importing its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_wrapper(kind: type) -> bool:
    return issubclass(kind, Tensor) and kind.__torch_dispatch__ is not _OWN_DISPATCH


def _placed(tensor: Any) -> tuple[str, Any]:
    if is_dtensor(tensor):
        return str(tensor.placements), tensor.device_mesh
    return "a plain tensor", None
