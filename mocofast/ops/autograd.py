"""Connects the kernels to autograd and to torch.compile.

Eager mode calls the kernels directly, compiled code calls them through custom ops.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from mocofast_kernels.cpu import InfoNCEForward
from torch import Tensor
from torch.autograd import forward_ad

from mocofast.ops import backend
from mocofast.ops.first_derivative import first_derivative


class _Options(NamedTuple):
    """Arguments of the kernels other than tensors and temperature."""

    normalize: bool
    normalize_negatives: bool
    exclude_period: int
    return_rank: bool
    dot_dtype: torch.dtype


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
    return_rank: bool,
    reduction: str,
) -> tuple[Tensor, Tensor | None]:
    """Returns the float32 loss, (N,) or reduced to (), and the positive rank (N,) int32 or None.

    Expects checked arguments, as `mocofast_kernels.cpu.infonce_forward` documents them.
    """
    # Products run in the autocast dtype if autocast is on, else in the inputs' promoted dtype.
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dot_dtype = torch.get_autocast_dtype(device_type)
    else:
        dot_dtype = torch.promote_types(
            torch.promote_types(query.dtype, positive.dtype), negatives.dtype
        )
    options = _Options(normalize, normalize_negatives, exclude_period, return_rank, dot_dtype)
    scalar, tensor = (0.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)

    # The forward sweep computes all gradients except the negatives' gradient.
    needs_forward_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, positive, tensor)
    )
    needs_negatives_grad = torch.is_grad_enabled() and negatives.requires_grad

    # Compiled code calls the op. Eager mode avoids the op: its wrapper costs tens of microseconds.
    if torch.compiler.is_compiling():
        loss, _, positive_rank, _, _, _ = _info_nce_op(
            query, positive, negatives, tensor, scalar, *options, needs_forward_grad
        )
        return _reduced(loss, reduction), positive_rank if return_rank else None
    if needs_forward_grad or needs_negatives_grad or device_type != "cpu":
        _refuse_transforms(query, positive, negatives, tensor)
    if needs_forward_grad or needs_negatives_grad:
        return _InfoNCE.apply(query, positive, negatives, tensor, scalar, options, reduction)
    forward = _forward(query, positive, negatives, temperature, options, compute_grad=False)
    return _reduced(forward.loss, reduction), forward.rank


def _refuse_transforms(*inputs: Tensor | None) -> None:
    """Raises RuntimeError under transforms of torch.func, and for dual numbers (forward mode).

    The gradient is computed by kernels, which carry neither.
    """
    dual = forward_ad._current_level >= 0 and any(  # unpack_dual fails outside a level
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    )
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "info_nce, nt_xent and clip_loss have no transforms of torch.func and no forward mode: "
            "take the gradient by loss.backward() or torch.autograd.grad"
        )


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    options: _Options,
    compute_grad: bool,
    only_query: bool = False,
) -> InfoNCEForward:
    device_type = query.device.type
    with _without_autocast(device_type):
        return backend.backend_for(device_type).infonce_forward(
            query,
            positive,
            negatives,
            temperature,
            **options._asdict(),
            compute_grad=compute_grad,
            only_query=only_query,
        )


def _grad_negatives(
    grad_loss: Tensor,
    query: Tensor,
    negatives: Tensor,
    lse: Tensor,
    temperature: float | Tensor,
    options: _Options,
) -> Tensor:
    arguments = options._asdict()
    del arguments["return_rank"]
    device_type = query.device.type
    with _without_autocast(device_type):
        return backend.backend_for(device_type).infonce_grad_negatives(
            grad_loss, query.detach(), negatives.detach(), lse, temperature, **arguments
        )


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off: the CPU path would otherwise compute float32 products in bfloat16."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _temperature_grad(grad_loss: Tensor, grad_scale: Tensor, temperature: Tensor) -> Tensor:
    """Returns dL/dT, (), from the rows' gradients dL/d(1/T), (N,)."""
    return -(grad_loss * grad_scale).sum() / temperature.float().square()


class _InfoNCE(torch.autograd.Function):
    """InfoNCE whose forward sweep also computes gradients. Only the negatives' gradient waits.

    The negatives' gradient sums over all queries, so backward recomputes the logits for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        negatives: Tensor,
        temperature: Tensor | None,
        scalar: float,
        options: _Options,
        reduction: str,
    ) -> tuple[Tensor, Tensor | None]:
        need_query, need_positive, need_negatives, need_temperature = ctx.needs_input_grad[:4]
        only_query = not (need_positive or need_negatives or need_temperature)
        compute_grad = need_query or need_positive or need_temperature
        temperature_value = scalar if temperature is None else temperature
        result = _forward(
            query, positive, negatives, temperature_value, options, compute_grad, only_query
        )
        if result.rank is not None:
            ctx.mark_non_differentiable(result.rank)
        ctx.options, ctx.scalar, ctx.reduction, ctx.rows = options, scalar, reduction, len(query)
        ctx.dtypes = (query.dtype, positive.dtype, negatives.dtype)
        # Inputs are saved only for gradients, so that a queue may be overwritten before backward.
        ctx.save_for_backward(
            result.grad_query if need_query else None,
            result.grad_positive if need_positive else None,
            result.grad_scale if need_temperature else None,
            result.lse if need_negatives else None,
            query if need_query or need_negatives else None,
            positive if need_positive else None,
            negatives if need_negatives else None,
            temperature if need_temperature or need_negatives else None,
        )
        # Reducing inside the function spares autograd a node.
        return _reduced(result.loss, reduction), result.rank

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_query, grad_positive, grad_scale, lse, query, positive, negatives, temperature = (
            ctx.saved_tensors
        )
        query_dtype, positive_dtype, negatives_dtype = ctx.dtypes
        grads: list[Tensor | None] = [None] * 4
        with torch.no_grad():
            # Gradient of the row losses: () if all rows share the gradient, else (N,).
            factor = grad_loss / ctx.rows if ctx.reduction == "mean" else grad_loss
            column = factor[:, None] if factor.dim() else factor
            # Gradients known since forward.
            if grad_query is not None:
                grads[0] = (grad_query * column).to(query_dtype)
            if grad_positive is not None:
                grads[1] = (grad_positive * column).to(positive_dtype)
            # Second sweep over the logits.
            if lse is not None:
                temperature_value = ctx.scalar if temperature is None else temperature
                row_factors = factor.expand(ctx.rows)  # (N,)
                grads[2] = _grad_negatives(
                    row_factors, query, negatives, lse, temperature_value, ctx.options
                ).to(negatives_dtype)
            if grad_scale is not None:
                grads[3] = _temperature_grad(factor, grad_scale, temperature).to(temperature.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            inputs = (grad_loss, query, positive, negatives, temperature)
            grads = first_derivative("info_nce", grads, inputs)
        return *grads, None, None, None


# --- torch.compile: custom ops, opaque to the compiler ---


@torch.library.custom_op("mocofast::info_nce", mutates_args=())
def _info_nce_op(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: Tensor | None,
    scalar: float,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
    return_rank: bool,
    dot_dtype: torch.dtype,
    compute_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = _Options(normalize, normalize_negatives, exclude_period, return_rank, dot_dtype)
    result = _forward(
        query,
        positive,
        negatives,
        scalar if temperature is None else temperature,
        options,
        compute_grad,
    )
    assert result.lse is not None  # because only_query is False
    # Outputs of an op cannot be None, so empty tensors stand for None.
    return (
        result.loss,
        result.lse,
        query.new_empty(0, dtype=torch.int32) if result.rank is None else result.rank,
        query.new_empty(0, dtype=torch.float32) if result.grad_query is None else result.grad_query,
        query.new_empty(0, dtype=torch.float32)
        if result.grad_positive is None
        else result.grad_positive,
        query.new_empty(0, dtype=torch.float32) if result.grad_scale is None else result.grad_scale,
    )


@_info_nce_op.register_fake
def _(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: Tensor | None,
    scalar: float,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
    return_rank: bool,
    dot_dtype: torch.dtype,
    compute_grad: bool,
) -> tuple[Tensor, ...]:
    rows, none = (query.shape[0],), (0,)
    return (
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(rows if return_rank else none, dtype=torch.int32),
        query.new_empty(query.shape if compute_grad else none, dtype=torch.float32),
        query.new_empty(query.shape if compute_grad else none, dtype=torch.float32),
        query.new_empty(rows if compute_grad else none, dtype=torch.float32),
    )


@torch.library.custom_op("mocofast::info_nce_grad_negatives", mutates_args=())
def _grad_negatives_op(
    grad_loss: Tensor,
    query: Tensor,
    negatives: Tensor,
    lse: Tensor,
    temperature: Tensor | None,
    scalar: float,
    normalize: bool,
    normalize_negatives: bool,
    exclude_period: int,
    dot_dtype: torch.dtype,
) -> Tensor:
    options = _Options(normalize, normalize_negatives, exclude_period, False, dot_dtype)
    temperature_value = scalar if temperature is None else temperature
    return _grad_negatives(grad_loss, query, negatives, lse, temperature_value, options)


@_grad_negatives_op.register_fake
def _(
    grad_loss: Tensor,
    query: Tensor,
    negatives: Tensor,
    *_: Any,
) -> Tensor:
    return negatives.new_empty(negatives.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        query,
        positive,
        negatives,
        temperature,
        scalar,
        normalize,
        normalize_negatives,
        period,
        _,
        dot_dtype,
        _,
    ) = inputs
    _, lse, _, grad_query, grad_positive, grad_scale = output
    need_negatives, need_temperature = ctx.needs_input_grad[2:4]
    ctx.dtypes = (query.dtype, positive.dtype, negatives.dtype)
    ctx.options = (scalar, normalize, normalize_negatives, period, dot_dtype)
    ctx.save_for_backward(
        grad_query,
        grad_positive,
        grad_scale,
        *((lse, query, negatives) if need_negatives else (None, None, None)),
        temperature if need_negatives or need_temperature else None,
    )


def _op_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_query, grad_positive, grad_scale, lse, query, negatives, temperature = ctx.saved_tensors
    need_query, need_positive, need_negatives, need_temperature = ctx.needs_input_grad[:4]
    grads: list[Tensor | None] = [None] * 11
    if need_query:
        grads[0] = (grad_loss[:, None] * grad_query).to(ctx.dtypes[0])
    if need_positive:
        grads[1] = (grad_loss[:, None] * grad_positive).to(ctx.dtypes[1])
    if need_negatives:
        grads[2] = _grad_negatives_op(
            grad_loss, query, negatives, lse, temperature, *ctx.options
        ).to(ctx.dtypes[2])
    if need_temperature:
        grads[3] = _temperature_grad(grad_loss, grad_scale, temperature).to(temperature.dtype)
    return tuple(grads)


_info_nce_op.register_autograd(_op_backward, setup_context=_setup_context)


@torch.library.custom_op("mocofast::enqueue_", mutates_args=("queue", "pointer"))
def _enqueue_op(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    backend.backend_for(queue.device.type).enqueue_(queue, pointer, keys, normalize=normalize)


@torch.library.custom_op("mocofast::ema_update_", mutates_args=("targets",))
def _ema_update_op(
    targets: list[Tensor], sources: list[Tensor], momentum: Tensor | None, scalar: float
) -> None:
    backend.backend_for(targets[0].device.type).ema_update_(
        targets, sources, scalar if momentum is None else momentum
    )


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    """Calls the kernel of the queue's device, through an op while torch.compile traces."""
    if torch.compiler.is_compiling():
        _enqueue_op(queue, pointer, keys, normalize)
    else:
        backend.backend_for(queue.device.type).enqueue_(queue, pointer, keys, normalize=normalize)


def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: float | Tensor) -> None:
    """Calls the kernel for tensors of a single device, through an op while torch.compile traces."""
    if torch.compiler.is_compiling():
        scalar, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
        _ema_update_op(targets, sources, tensor, scalar)
    else:
        backend.backend_for(targets[0].device.type).ema_update_(targets, sources, momentum)
