"""The gradient of a loss by itself, which kernels know to be 1 without a look at its value."""

from __future__ import annotations

import torch
from torch import Tensor

_units: dict[torch.device, Tensor] = {}


def unit_gradient(device: torch.device) -> Tensor:
    """Returns 1, () float32, on the device: the same tensor at every call. Do not write into it.

    With `loss.backward(gradient=unit_gradient(loss.device))` the mean of `info_nce` has two
    launches on CUDA, forward and backward: `backward` neither fills a tensor with 1 nor multiplies
    by it.
    """
    unit = _units.get(device)
    if unit is None:
        with torch.inference_mode(False):
            unit = torch.ones((), device=device)
        # A graph under capture fills its tensors at the replay, and not now.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _units[device] = unit
    return unit


def is_unit(gradient: Tensor) -> bool:
    """Returns whether the gradient is the tensor of `unit_gradient`."""
    return gradient is _units.get(gradient.device)
