"""Checks of arguments, shared by the ops. Every ValueError or TypeError names the argument."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = (*FLOATS, torch.float64)  # of the losses, float64 on CPUs alone
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")


def described(value: Any) -> str:
    """Returns dtype and shape of a tensor, or the repr of other values, for messages."""
    return (
        f"{value.dtype} tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else repr(value)
    )


def check_features(name: str, value: Any, shape: str, query: Tensor | None = None) -> None:
    """Raises unless `value` holds features: a tensor of a supported dtype, not empty.

    shape: "(N, C)" or "(N, L, C)", say: the number of dimensions is checked.
    query: the first features. Device, and whether the type is float64, must agree.
    """
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        if value.device.type != "cpu":
            raise TypeError(
                f"{name} must be float32, bfloat16 or float16 on {value.device.type}: got "
                f"{described(value)}. Losses of float64 run on CPUs"
            )
    elif not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be a float32, bfloat16, float16 or (on a CPU) float64 tensor of shape "
            f"{shape}, not empty: got {described(value)}"
        )
    if value.dim() != shape.count(",") + 1 or 0 in value.shape:
        raise ValueError(f"{name} must have the shape {shape}, not empty: got {described(value)}")
    if query is not None:
        check_same(name, value.device, "device of the first features", query.device)
        if (value.dtype == torch.float64) != (query.dtype == torch.float64):
            raise TypeError(
                f"{name} must be float64 exactly where the first features are: got {value.dtype} "
                f"beside {query.dtype}"
            )


def checked_ids(name: str, value: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """Returns ids as int64, contiguous. Raises unless `value` holds integers of the shape."""
    expected = f"{name} must be a tensor of integers of shape {tuple(shape)}"
    _check_tensor(expected, name, value, INTEGERS, tuple(shape), device)
    return value.to(torch.int64).contiguous()


def checked_mask(name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the mask. Raises unless `value` is a bool tensor of the shape."""
    expected = f"{name} must be a bool tensor of shape {shape}"
    _check_tensor(expected, name, value, (torch.bool,), shape, device)
    return value


def _check_tensor(
    expected: str,
    name: str,
    value: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        raise TypeError(f"{expected}: got {described(value)}")
    if value.shape != shape:
        raise ValueError(f"{expected}: got {described(value)}")
    check_same(name, value.device, "device of the features", device)


def check_same(name: str, got: Any, what: str, expected: Any) -> None:
    """Raises unless a property of the argument `name` equals the expected value of `what`."""
    if got != expected:
        raise ValueError(
            f"{name} must match the {what}: got {_plain(got)}, expected {_plain(expected)}"
        )


def check_width(name: str, value: Tensor, of: str, expected: Tensor) -> None:
    """Raises unless two tensors agree in C, their last dimension."""
    check_same(name, value.shape[-1], f"last dimension of {of}", expected.shape[-1])


def check_rows(name: str, value: Any, of: str, count: int) -> None:
    """Raises unless `value` is slice(start, stop) of at least one of the `count` rows of `of`."""
    expected = (
        f"{name} must be slice(start, stop) with 0 <= start < stop <= {count}, the rows of {of}"
    )
    if not isinstance(value, slice) or not (
        isinstance(value.start, int) and isinstance(value.stop, int)
    ):
        raise TypeError(f"{expected}: got {described(value)}")
    if not 0 <= value.start < value.stop <= count or value.step not in (None, 1):
        raise ValueError(f"{expected}: got {value}")


def check_several(name: str, count: int) -> None:
    """Raises unless a batch has 2 rows or more: a row is a negative of another row."""
    if count == 1:
        raise ValueError(
            f"{name} must have 2 rows or more, because the other rows are the negatives: got 1 "
            "row, and a loss of 0 that teaches nothing"
        )


def check_reduction(value: Any) -> None:
    """Raises unless `value` names a reduction."""
    if value not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}: got {value!r}")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def checked_temperature(
    value: Any, device: torch.device, name: str = "temperature"
) -> float | Tensor:
    """Returns a float or the 0-d tensor itself. Raises unless the value is a finite number > 0."""
    return _checked_scalar(value, device, name, "a finite float > 0", 0)


def checked_number(value: Any, device: torch.device, name: str) -> float | Tensor:
    """Returns a float or the 0-d tensor itself. Raises unless the value is a finite number."""
    return _checked_scalar(value, device, name, "a finite float", -math.inf)


def _checked_scalar(
    value: Any, device: torch.device, name: str, kind: str, least: float
) -> float | Tensor:
    """Raises unless value > least, and finite.

    The value of a CUDA tensor is not read, because reading makes the host wait, and neither are
    the several values of a tensor that vmap maps.
    """
    expected = f"{name} must be {kind} or a 0-d floating tensor"
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{expected}: got {described(value)}")
        if value.dim() != 0:
            raise ValueError(f"{expected}: got {described(value)}")
        check_same(name, value.device, "device of the features", device)
        is_mapped = torch._C._functorch.is_batchedtensor(value)
        if device.type != "cpu" or torch.compiler.is_compiling() or is_mapped:
            return value
        number = float(value.detach())
    elif isinstance(value, Real) and not isinstance(value, bool):
        value = number = float(value)
    else:
        raise TypeError(f"{expected}: got {value!r}")
    if not least < number < math.inf:
        raise ValueError(f"{expected}: got {number}")
    return value
