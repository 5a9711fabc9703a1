"""Checks of arguments that the ops share: ValueError or TypeError names the argument."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def described(value: Any) -> str:
    return (
        f"{value.dtype} tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else repr(value)
    )


def check_matrix(name: str, value: Any, shape: str) -> None:
    expected = f"{name} must be a float32, bfloat16 or float16 tensor of shape {shape}, not empty"
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise TypeError(f"{expected}: got {described(value)}")
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{expected}: got {described(value)}")


def check_same(name: str, got: Any, what: str, expected: Any) -> None:
    if got != expected:
        raise ValueError(
            f"{name} must match the {what}: got {_plain(got)}, expected {_plain(expected)}"
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def checked_temperature(
    value: Any, device: torch.device, name: str = "temperature"
) -> float | Tensor:
    expected = f"{name} must be a finite float > 0 or a 0-d floating tensor"
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{expected}: got {described(value)}")
        if value.dim() != 0:
            raise ValueError(f"{expected}: got {described(value)}")
        check_same(name, value.device, "device of the features", device)
        if device.type != "cpu" or torch.compiler.is_compiling():
            return value
        number = float(value.detach())
    elif isinstance(value, Real) and not isinstance(value, bool):
        value = number = float(value)
    else:
        raise TypeError(f"{expected}: got {value!r}")
    if not 0 < number < math.inf:
        raise ValueError(f"{expected}: got {number}")
    return value
