"""Ghost BatchNorm on CPUs with AVX-512: BatchNorm over splits of a batch, in channels-last memory.

The pass that writes the output also adds a residual and applies ReLU.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocofast_kernels.cpu_library import library, threads_of_openmp

# Elements of a thread. With fewer, a second thread costs more time than it takes over.
ELEMENTS = 16384
PIXELS = 64  # of a group of images, at least
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # the library's numbers


class GhostBatchNorm(NamedTuple):
    """Result of `ghost_bn_forward`."""

    output: Tensor  # (N, C, H, W) of the input's type, channels-last
    # (3, num_splits, C) float32: mean, biased variance, 1 / sqrt(variance + eps)
    statistics: Tensor


@functools.cache
def normalises(dtype: torch.dtype) -> bool:
    """Says whether the library normalises images of this type on this CPU."""
    found, _ = library()
    return (
        dtype in TYPES
        and hasattr(found, "batch_norm_runs")  # absent in an older build
        and bool(found.batch_norm_runs(TYPES[dtype]))  # type: ignore[union-attr]
        and threads_of_openmp() is not None
    )


def ghost_bn_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    num_splits: int,
    momentum: float,
    eps: float,
    relu: bool,
) -> GhostBatchNorm:
    """As `mocofast_kernels.ghost_bn.ghost_bn_forward`. weight, bias: float32."""
    output = torch.empty_like(x, memory_format=torch.channels_last)
    layout, groups = _layout(x.shape, num_splits)
    channels = num_splits * layout[2]
    statistics = _floats(3, num_splits, layout[2])
    scratch = _floats(channels * (1 + 2 * groups))
    # The running statistics may be of another type or memory order.
    running = (running_mean, running_var)
    in_c = all(r is not None and r.dtype == torch.float32 and r.is_contiguous() for r in running)
    weight, bias = weight.contiguous(), bias.contiguous()
    _functions()[0](
        TYPES[x.dtype],
        *layout,
        groups,
        x.data_ptr(),
        _address(residual),
        output.data_ptr(),
        relu,
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        statistics.data_ptr(),
        momentum,
        *map(_address, running if in_c else (None, None)),
        scratch.data_ptr(),
        _parts(x, num_splits * groups),
        threads_of_openmp(),
    )
    if running_mean is not None and running_var is not None and not in_c:
        count = x.numel() // channels
        mean, variance = statistics[:2].mean(1)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return GhostBatchNorm(output, statistics)


def ghost_bn_backward(
    grad_output: Tensor,
    x: Tensor,
    output: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    *,
    num_splits: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `mocofast_kernels.ghost_bn.ghost_bn_backward`. weight, bias: float32.

    Returns gradients of x, weight, bias and residual.
    """
    layout, groups = _layout(x.shape, num_splits)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    has_residual = relu and output is not None
    grad_residual = torch.empty_like(grad_x) if has_residual else grad_output
    weight, bias = weight.contiguous(), bias.contiguous()
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    scratch = _floats(num_splits * layout[2] * (3 + 2 * groups))
    _functions()[1](
        TYPES[x.dtype],
        *layout,
        groups,
        x.data_ptr(),
        _address(output),
        grad_output.data_ptr(),
        grad_x.data_ptr(),
        grad_residual.data_ptr() if has_residual else None,
        relu,
        weight.data_ptr(),
        bias.data_ptr(),
        statistics.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        scratch.data_ptr(),
        _parts(x, num_splits * groups),
        threads_of_openmp(),
    )
    return grad_x, grad_weight, grad_bias, grad_residual


@functools.cache
def _functions() -> tuple[Any, Any]:
    """Returns the library's functions, forward and backward."""
    found, _ = library()
    assert found is not None
    integer, number, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    forward, backward = found.batch_norm_forward, found.batch_norm_backward
    layout = [ctypes.c_int, *[integer] * 6]
    forward.argtypes = [
        *layout,
        *[pointer] * 3,
        ctypes.c_int,
        *[pointer] * 2,
        number,
        pointer,
        number,
        *[pointer] * 3,
        integer,
        pointer,
    ]
    backward.argtypes = [
        *layout,
        *[pointer] * 5,
        ctypes.c_int,
        *[pointer] * 6,
        integer,
        pointer,
    ]
    forward.restype = backward.restype = None
    return forward, backward


def _layout(shape: torch.Size, num_splits: int) -> tuple[tuple[int, ...], int]:
    """Returns (images, pixels, channels, splits, images of a group) and the groups of a split.

    A group's sums are float32: some images where images are small, else one.
    """
    images, channels, height, width = shape
    pixels = height * width
    group = max(1, min(PIXELS // pixels, images // num_splits))
    return (images, pixels, channels, num_splits, group), -(-images // num_splits // group)


def _parts(x: Tensor, groups: int) -> int:
    return max(1, min(torch.get_num_threads(), groups, x.numel() // ELEMENTS))


def _floats(*sizes: int) -> Tensor:
    """Returns memory for float32 numbers. PyTorch's default type and device may be others."""
    return torch.empty(sizes, dtype=torch.float32, device="cpu")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
