"""The order in memory and the layers for the fastest training on a device."""

from __future__ import annotations

import torch
from mocofast_kernels.cpu_ghost_bn import normalises
from torch import nn

from mocofast.models.batch_norm import fuse_batch_norms, memory_format
from mocofast.models.convolutions import compile_convolutions


def to_fastest_format(
    module: nn.Module, device: torch.device, splits: int = 1
) -> torch.memory_format:
    """Moves a model to the device, in the order in memory for the fastest training there.

    On a CPU convolutions and BatchNorm run in C where possible. Names and values of the state dict
    stay.

    splits: the most splits of BatchNorm on a rank, see `models.batch_norm.memory_format`.
    Returns the order in memory, of images too.
    """
    order = memory_format(splits, device)
    module.to(device=device, memory_format=order)  # type: ignore[call-overload]
    if device.type == "cpu" and order == torch.channels_last:
        compile_convolutions(module)
        if normalises(torch.float32):
            fuse_batch_norms(module)
    return order
