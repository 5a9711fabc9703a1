"""Ghost BatchNorm: BatchNorm over splits of a batch (Hoffer et al. 2017, arXiv:1705.08741).

Channels-last tensors go to kernels which also add a residual and rectify: Triton's on CUDA, in
C on CPUs with AVX-512. Eager mode calls the kernels directly, compiled code on CUDA through custom
ops. All other tensors go to PyTorch's BatchNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from mocofast_kernels import cpu_ghost_bn
from torch import Tensor

from mocofast.ops import backend
from mocofast.ops.batch_norm_pytorch import pytorch_batch_norm
from mocofast.ops.first_derivative import first_derivative
from mocofast.ops.transforms import is_transformed

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_splits: int,
    momentum: float,
    eps: float,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalises every split of the batch by its own statistics, as BatchNorm in training mode.

    Sample n belongs to split n % num_splits.

    x: (N, C, H, W).
    weight, bias: (C,).
    running_mean, running_var: (C,), updated in place with PyTorch's momentum and unbiased
        variance. Every split would give an update, and the mean of the updates is written.
    num_splits: number of splits. Must divide N.
    momentum: weight of the new statistics in the running statistics, in [0, 1].
    eps: added to the variance.
    relu: rectifies the result, after the residual is added.
    residual: (N, C, H, W), the dtype of x, or None. Added to the normalised values.

    Returns (N, C, H, W), in the dtype and memory format of x. In the kernels statistics and
    arithmetic are float32 for every dtype.
    Raises, before anything changes, ValueError if x is not 4-D or has another number of channels
    than the weights, num_splits does not divide N, a split has a single value per channel, or
    residual has another shape than x, and TypeError if residual has another dtype than x. A second
    derivative of a kernel raises RuntimeError.
    """
    _check(x, num_splits, residual, (weight, bias, running_mean, running_var))

    # Without a kernel: other devices, dtypes and memory formats.
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if (
        not backend.fuses_batch_norm(x.device.type)
        or x.dtype not in FUSED_DTYPES
        # In NCHW memory PyTorch's BatchNorm needs no copy: splits are channels of a view.
        or (x.is_contiguous() and not channels_last)
        or not x.numel()
        or not _takes(x, residual, weight, bias, running_mean, running_var)
    ):
        return pytorch_batch_norm(
            x, weight, bias, running_mean, running_var, num_splits, momentum, eps, relu, residual
        )

    # Kernels, in channels-last memory.
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    # Under torch.compile the operator has no side effects, so the running statistics follow it.
    if torch.compiler.is_compiling():
        y, statistics = _ghost_batch_norm_op(x, residual, weight, bias, num_splits, eps, relu)
        _update(running_mean, running_var, statistics, x.numel() // statistics[0].numel(), momentum)
        return y
    # Eager mode. Without a gradient nothing is kept for a backward pass.
    arguments = (
        x,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_splits,
        momentum,
        eps,
        relu,
    )
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, weight, bias)
    ):
        return _GhostBatchNorm.apply(*arguments)
    return _forward(*arguments)[0]


def _takes(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *running: Tensor
) -> bool:
    """Says whether the kernel of the device takes these tensors. In C there are more conditions."""
    if torch.compiler.is_compiling():  # `backend.fuses_batch_norm` has said yes: Triton's
        return True
    if backend.backend_for(x.device.type).ghost_bn_forward is not cpu_ghost_bn.ghost_bn_forward:
        return True
    return (
        cpu_ghost_bn.normalises(x.dtype)
        and weight.dtype == bias.dtype == torch.float32
        and type(x) is Tensor
        and not any(
            t is not None and (t.device != x.device or t.is_neg())
            for t in (x, residual, weight, bias, *running)
        )
        and not is_transformed()
    )


def _check(
    x: Tensor, num_splits: int, residual: Tensor | None, of_channels: tuple[Tensor, ...]
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W): got shape {tuple(x.shape)}")
    for tensor in of_channels:
        if tensor.numel() != x.shape[1]:
            raise ValueError(
                f"x must have {tensor.numel()} channels, as weights and statistics: "
                f"got shape {tuple(x.shape)}"
            )
    if num_splits < 1 or len(x) % num_splits:
        raise ValueError(
            "the batch must be divisible by num_splits: "
            f"got {len(x)} images and {num_splits} splits"
        )
    values = x.shape[2] * x.shape[3] * (len(x) // num_splits)
    if values == 1:
        where = f" in each of {num_splits} splits" if num_splits > 1 else ""
        raise ValueError(
            f"x must hold more than one value per channel{where}: got shape {tuple(x.shape)}"
        )
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have x's shape {tuple(x.shape)}: got {tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have x's type {x.dtype}: got {residual.dtype}")


def _update(
    running_mean: Tensor, running_var: Tensor, statistics: Tensor, count: int, momentum: float
) -> None:
    """Updates running statistics by PyTorch operators, which the compiler fuses.

    statistics: means and biased variances of the splits, (3, num_splits, C), rows 0 and 1.
    count: values per channel and split.
    """
    with torch.no_grad():
        mean, variance = statistics[0].mean(0), statistics[1].mean(0) * (count / (count - 1))
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(variance.to(running_var.dtype), momentum)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_splits: int,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the output, (N, C, H, W), and the statistics of the splits, (3, num_splits, C).

    `mocofast_kernels.cpu_ghost_bn.GhostBatchNorm` documents the statistics.
    """
    forward = backend.backend_for(x.device.type).ghost_bn_forward
    assert forward is not None
    return forward(
        x,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_splits=num_splits,
        momentum=momentum,
        eps=eps,
        relu=relu,
    )


def _backward(
    grad_output: Tensor,
    x: Tensor,
    output: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    num_splits: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of x, weight, bias and residual.

    Without ReLU, the residual's gradient is grad_output itself.
    """
    grad_output = grad_output.contiguous(memory_format=torch.channels_last).resolve_neg()
    backward = backend.backend_for(x.device.type).ghost_bn_backward
    assert backward is not None
    grad_x, grad_weight, grad_bias, grad_residual = backward(
        grad_output, x, output, weight, bias, statistics, num_splits=num_splits, relu=relu
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_residual


class _GhostBatchNorm(torch.autograd.Function):
    """Saves x, and with relu and residual also the output: x alone gives no ReLU mask then."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        num_splits: int,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        y, statistics = _forward(
            x, residual, weight, bias, running_mean, running_var, num_splits, momentum, eps, relu
        )
        has_residual = residual is not None
        ctx.save_for_backward(x, y if relu and has_residual else None, weight, bias, statistics)
        ctx.options = (num_splits, relu, has_residual)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        num_splits, relu, has_residual = ctx.options
        x, y, weight, bias, statistics = ctx.saved_tensors
        with torch.no_grad():
            grad_x, grad_weight, grad_bias, grad_residual = _backward(
                grad_output, x, y, weight, bias, statistics, num_splits, relu
            )
        grads = [grad_x, grad_residual if has_residual else None, grad_weight, grad_bias]
        if torch.is_grad_enabled():  # create_graph=True
            inputs = (grad_output, x, weight, bias)
            grads = first_derivative("ghost_batch_norm", grads, inputs)
        return *grads, *[None] * 6


# --- torch.compile: custom ops, opaque to the compiler ---


@torch.library.custom_op("mocofast::ghost_batch_norm", mutates_args=())
def _ghost_batch_norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_splits: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    y, statistics = _forward(x, residual, weight, bias, None, None, num_splits, 0.0, eps, relu)
    return y, statistics


@_ghost_batch_norm_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_splits: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        x.new_empty((3, num_splits, x.shape[1]), dtype=torch.float32),
    )


@torch.library.custom_op("mocofast::ghost_batch_norm_backward", mutates_args=())
def _backward_op(
    grad_output: Tensor,
    x: Tensor,
    output: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    num_splits: int,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias, grad_residual = _backward(
        grad_output, x, output, weight, bias, statistics, num_splits, relu
    )
    # An op must not return an input, so an empty tensor stands for grad_output.
    return grad_x, grad_weight, grad_bias, x.new_empty(0) if output is None else grad_residual


@_backward_op.register_fake
def _(
    grad_output: Tensor,
    x: Tensor,
    output: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad_residual = x.new_empty(0) if output is None else torch.empty_like(grad_x)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias), grad_residual


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, bias, num_splits, _, relu = inputs
    y, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, statistics)
    ctx.options = (num_splits, relu, residual is not None)


def _op_backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Any, ...]:
    num_splits, relu, has_residual = ctx.options
    grad_x, grad_weight, grad_bias, rectified = _backward_op(
        grad_output, *ctx.saved_tensors, num_splits, relu
    )
    grad_residual = (rectified if relu else grad_output) if has_residual else None
    return grad_x, grad_residual, grad_weight, grad_bias, None, None, None


_ghost_batch_norm_op.register_autograd(_op_backward, setup_context=_setup_context)
