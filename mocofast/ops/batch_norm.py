"""Ghost BatchNorm: training-mode BatchNorm over parts of a batch (Hoffer et al. 2017, arXiv:1705.08741); and how a
model's BatchNorms are replaced.

On CUDA channels-last tensors go to Triton kernels that also add a residual and rectify, directly in eager mode and as
custom ops under torch.compile; all others to PyTorch's own BatchNorm. Importing this needs neither a GPU nor Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mocofast.ops import backend
from mocofast.ops.first_derivative import first_derivative

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
    """BatchNorm in training mode over `num_splits` parts of the batch: sample n belongs to part n % num_splits.

    x: (N, C, H, W). weight, bias, running_mean, running_var: (C,). residual, like x, is added to the normalised
    values; `relu` then rectifies them. Returns (N, C, H, W) of x's type and memory format; statistics and arithmetic
    are float32 on CUDA, whatever that type. Running statistics become the mean over the parts of what each part would
    have made them, with PyTorch's momentum and unbiased variance. The Triton path has no second derivative and says
    so (RuntimeError).

    ValueError, with nothing changed, for an x that is not 4-D, a batch that num_splits does not divide, parts of one
    value a channel, and a residual of another shape; TypeError for one of another type.
    """
    _check(x, num_splits, residual)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if (
        not backend.fuses_batch_norm(x.device.type)
        or x.dtype not in FUSED_DTYPES
        # In NCHW memory PyTorch's BatchNorm takes the parts as they lie.
        or (x.is_contiguous() and not channels_last)
    ):
        return _native(
            x, weight, bias, running_mean, running_var, num_splits, momentum, eps, relu, residual
        )
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if torch.compiler.is_compiling():
        y, statistics = _ghost_batch_norm_op(x, residual, weight, bias, num_splits, eps, relu)
        _update(running_mean, running_var, statistics, x.numel() // statistics[0].numel(), momentum)
        return y
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


def _check(x: Tensor, num_splits: int, residual: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W): got shape {tuple(x.shape)}")
    if num_splits < 1 or len(x) % num_splits:
        raise ValueError(
            f"the batch must be divisible by num_splits: got {len(x)} images and {num_splits} splits"
        )
    values = x.shape[2] * x.shape[3] * (len(x) // num_splits)
    if values <= 1:
        raise ValueError(
            f"x must hold more than one value per channel in each of {num_splits} splits: got shape {tuple(x.shape)}"
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
    """What the kernels do with running statistics in eager mode, for the compiler to fuse."""
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
    """Output, and the parts' statistics as `mocofast_kernels.ghost_bn.GhostBatchNorm` has them."""
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
    """Gradients of x, weight, bias and residual (grad_output itself where there was no ReLU)."""
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    backward = backend.backend_for(x.device.type).ghost_bn_backward
    assert backward is not None
    grad_x, grad_weight, grad_bias, grad_residual = backward(
        grad_output, x, output, weight, bias, statistics, num_splits=num_splits, relu=relu
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_residual


class _GhostBatchNorm(torch.autograd.Function):
    """Keeps x, and the output only where the ReLU's mask cannot be worked out from x."""

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
            grads = first_derivative("ghost_batch_norm on CUDA", grads, inputs)
        return *grads, *[None] * 6


# --- torch.compile: the same, as ops that the compiler does not look into --------------------------------------


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
    # An op may return none of its inputs.
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


# --- PyTorch's BatchNorm -------------------------------------------------------------------------------------------


def _native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_splits: int,
    momentum: float,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))
    # Part by part, in cache, is faster forward in channels-last memory; backward it is slower by far.
    by_part = (
        x.is_contiguous(memory_format=torch.channels_last)
        and not tracked
        and not torch.compiler.is_compiling()
    )
    norm = _part_by_part if by_part else _folded
    y = norm(x, weight, bias, running_mean, running_var, num_splits, momentum, eps)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def _part_by_part(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_splits: int,
    momentum: float,
    eps: float,
) -> Tensor:
    y = torch.empty_like(x)
    means, variances = running_mean.repeat(num_splits, 1), running_var.repeat(num_splits, 1)
    for part, (mean, variance) in enumerate(zip(means, variances)):
        values = x[part::num_splits].contiguous(memory_format=torch.channels_last)
        y[part::num_splits] = F.batch_norm(
            values, mean, variance, weight, bias, True, momentum, eps
        )
    running_mean.copy_(means.mean(0))
    running_var.copy_(variances.mean(0))
    return y


def _folded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_splits: int,
    momentum: float,
    eps: float,
) -> Tensor:
    """Every part's channels become channels of their own."""
    means, variances = running_mean.repeat(num_splits), running_var.repeat(num_splits)
    folded = F.batch_norm(
        _fold(x, num_splits),
        means,
        variances,
        weight.repeat(num_splits),
        bias.repeat(num_splits),
        True,
        momentum,
        eps,
    )
    running_mean.copy_(means.view(num_splits, -1).mean(0))
    running_var.copy_(variances.view(num_splits, -1).mean(0))
    return _unfold(folded, x, num_splits)


def _fold(x: Tensor, splits: int) -> Tensor:
    """(N, C, H, W) -> (N/splits, splits*C, H, W): sample n moves into channel group n % splits.

    NCHW memory needs only another view of it. In channels-last memory rows of C values are re-ordered, once before
    and once after one native BatchNorm.
    """
    n, c, h, w = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.reshape(n // splits, splits * c, h, w)
    parts = x.permute(0, 2, 3, 1).view(n // splits, splits, h, w, c)
    return parts.permute(0, 2, 3, 1, 4).reshape(n // splits, h, w, splits * c).permute(0, 3, 1, 2)


def _unfold(folded: Tensor, x: Tensor, splits: int) -> Tensor:
    """The inverse of `_fold`, in the memory format of `x`."""
    n, c, h, w = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last):
        return folded.reshape(n, c, h, w)
    parts = folded.permute(0, 2, 3, 1).reshape(n // splits, h, w, splits, c)
    # With one sample a part, reshape alone would return a view of the folded memory.
    return parts.permute(0, 3, 1, 2, 4).contiguous().view(n, h, w, c).permute(0, 3, 1, 2)


# --- Replacing BatchNorms ------------------------------------------------------------------------------------------
