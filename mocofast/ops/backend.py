"""Chooses the kernels of a device type: losses, memory, optimisers, BatchNorm, augmentation.

`backend_for` is the only dispatch point of the package. Callers write `backend.backend_for`, so
that a test can replace the function and drive other kernels through the public ops.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from mocofast_kernels import cpu, cpu_ghost_bn, cpu_memory, cpu_optim, cpu_sigmoid
from mocofast_kernels.cpu import InfoNCEForward
from mocofast_kernels.cpu_sigmoid import SigmoidForward
from torch import Tensor

# Device types that have a BatchNorm kernel: a constant, which torch.compile reads while it traces.
BATCH_NORM_DEVICES = ("cuda",) if importlib.util.find_spec("triton") else ()


class Backend(NamedTuple):
    """The kernels of a device type.

    The first nine are documented in `mocofast_kernels.cpu`, `.cpu_sigmoid`, `.cpu_memory` and
    `.cpu_optim`, the last three in `mocofast_kernels.ghost_bn` and `mocofast_kernels.augment`.
    On a CPU BatchNorm has kernels for the types of `mocofast_kernels.cpu_ghost_bn.normalises`.
    None: the device has no fused kernel, and the caller composes PyTorch operators.
    """

    infonce_forward: Callable[..., InfoNCEForward]
    infonce_grad_negatives: Callable[..., Tensor]
    sigmoid_forward: Callable[..., SigmoidForward]
    sigmoid_grad_negatives: Callable[..., Tensor]
    enqueue_: Callable[..., None]
    ema_update_: Callable[..., None]
    sgd_: Callable[..., None]
    lars_: Callable[..., None]
    adamw_: Callable[..., None]
    ghost_bn_forward: Callable[..., Any] | None = None
    ghost_bn_backward: Callable[..., Any] | None = None
    augment: Callable[..., Any] | None = None


def fuses_batch_norm(device_type: str) -> bool:
    """Returns whether the device has a BatchNorm kernel."""
    if torch.compiler.is_compiling():
        return device_type in BATCH_NORM_DEVICES
    return backend_for(device_type).ghost_bn_forward is not None


@functools.cache
def backend_for(device_type: str) -> Backend:
    """Returns Triton kernels for "cuda" if Triton is installed, else PyTorch's operators."""
    if device_type == "cuda":
        try:
            return _triton_backend()
        except ImportError as error:
            if error.name is None or error.name.split(".")[0] != "triton":
                raise
            warnings.warn(
                f"mocofast: Triton is missing ({error}); the slower PyTorch path runs instead",
                stacklevel=3,
            )
    norms = (
        (cpu_ghost_bn.ghost_bn_forward, cpu_ghost_bn.ghost_bn_backward)
        if device_type == "cpu" and cpu_ghost_bn.normalises(torch.float32)
        else (None, None)
    )
    return Backend(
        cpu.infonce_forward,
        cpu.infonce_grad_negatives,
        cpu_sigmoid.sigmoid_forward,
        cpu_sigmoid.sigmoid_grad_negatives,
        cpu_memory.enqueue_,
        cpu_memory.ema_update_,
        cpu_optim.sgd_,
        cpu_optim.lars_,
        cpu_optim.adamw_,
        *norms,
    )


def _triton_backend() -> Backend:
    from mocofast_kernels.augment import augment
    from mocofast_kernels.ema import ema_update_
    from mocofast_kernels.enqueue import enqueue_
    from mocofast_kernels.ghost_bn import ghost_bn_backward, ghost_bn_forward
    from mocofast_kernels.infonce import infonce_forward
    from mocofast_kernels.infonce_backward import infonce_grad_negatives
    from mocofast_kernels.optim import adamw_, lars_, sgd_
    from mocofast_kernels.sigmoid import sigmoid_forward, sigmoid_grad_negatives

    return Backend(
        infonce_forward,
        infonce_grad_negatives,
        sigmoid_forward,
        sigmoid_grad_negatives,
        enqueue_,
        ema_update_,
        sgd_,
        lars_,
        adamw_,
        ghost_bn_forward,
        ghost_bn_backward,
        augment,
    )
