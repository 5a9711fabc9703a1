"""Custom ops, opaque to torch.compile: InfoNCE, the queue and the moving average."""

from __future__ import annotations

from typing import Any

import torch
from mocofast_kernels.cpu_vectors import wide_dtype
from mocofast_kernels.exclusion import Exclusion
from torch import Tensor

from mocofast.ops import backend, sweep
from mocofast.ops.sweep import Options


@torch.library.custom_op("mocofast::info_nce", mutates_args=())
def info_nce_op(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: Tensor | None,
    scalar: float,
    normalize: bool,
    normalize_negatives: bool,
    return_rank: bool,
    dot_dtype: torch.dtype,
    period: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    compute_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the fields of `InfoNCEForward` of N queries, with empty tensors in place of None.

    temperature: () or None, which takes `scalar`. Others: of `Options`, `Exclusion`, and
    `sweep.forward`, checked.
    """
    options = Options(normalize, normalize_negatives, return_rank, dot_dtype)
    result = sweep.forward(
        query,
        positive,
        negatives,
        scalar if temperature is None else temperature,
        options,
        Exclusion(period, query_ids, key_ids, mask),
        compute_grad,
    )
    assert result.lse is not None  # because only_query is False
    # Outputs of an op cannot be None, so empty tensors stand for None.
    none = query.new_empty(0, dtype=wide_dtype(query.dtype))
    return (
        result.loss,
        result.lse,
        query.new_empty(0, dtype=torch.int32) if result.rank is None else result.rank,
        none if result.grad_query is None else result.grad_query,
        none.clone() if result.grad_positive is None else result.grad_positive,
        none.clone() if result.grad_scale is None else result.grad_scale,
    )


@info_nce_op.register_fake
def _(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: Tensor | None,
    scalar: float,
    normalize: bool,
    normalize_negatives: bool,
    return_rank: bool,
    dot_dtype: torch.dtype,
    period: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
    compute_grad: bool,
) -> tuple[Tensor, ...]:
    rows, none, dtype = (query.shape[0],), (0,), wide_dtype(query.dtype)
    return (
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows if return_rank else none, dtype=torch.int32),
        query.new_empty(query.shape if compute_grad else none, dtype=dtype),
        query.new_empty(query.shape if compute_grad else none, dtype=dtype),
        query.new_empty(rows if compute_grad else none, dtype=dtype),
    )


@info_nce_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, ...]:
    """Computes the problems in turns: every problem is a sweep over negatives."""
    results = [
        info_nce_op(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(output) for output in zip(*results))
    return outputs, (0,) * len(outputs)


@torch.library.custom_op("mocofast::info_nce_grad_negatives", mutates_args=())
def grad_negatives_op(
    grad_loss: Tensor,
    query: Tensor,
    negatives: Tensor,
    lse: Tensor,
    temperature: Tensor | None,
    scalar: float,
    normalize: bool,
    normalize_negatives: bool,
    dot_dtype: torch.dtype,
    period: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Returns the gradient by the negatives, (K, C) float32. Arguments: as for `info_nce_op`.

    grad_loss, lse: (N,) float32, of the losses of `info_nce_op`.
    """
    return sweep.grad_negatives(
        grad_loss,
        query,
        negatives,
        lse,
        scalar if temperature is None else temperature,
        Options(normalize, normalize_negatives, False, dot_dtype),
        Exclusion(period, query_ids, key_ids, mask),
    )


@grad_negatives_op.register_fake
def _(
    grad_loss: Tensor,
    query: Tensor,
    negatives: Tensor,
    *_: Any,
) -> Tensor:
    return negatives.new_empty(negatives.shape, dtype=wide_dtype(query.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, positive, negatives, temperature, scalar, *options, _ = inputs
    normalize, normalize_negatives, _, dot_dtype, period, *ids_and_mask = options
    _, lse, _, grad_query, grad_positive, grad_scale = output
    need_negatives, need_temperature = ctx.needs_input_grad[2:4]
    ctx.dtypes = (query.dtype, positive.dtype, negatives.dtype)
    ctx.options = (scalar, normalize, normalize_negatives, dot_dtype, period)
    ctx.save_for_backward(
        grad_query,
        grad_positive,
        grad_scale,
        *((lse, query, negatives) if need_negatives else (None, None, None)),
        temperature if need_negatives or need_temperature else None,
        *(ids_and_mask if need_negatives else (None, None, None)),
    )


def _op_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    grad_query, grad_positive, grad_scale, *inputs = ctx.saved_tensors
    lse, query, negatives, temperature, *ids_and_mask = inputs
    need_query, need_positive, need_negatives, need_temperature = ctx.needs_input_grad[:4]
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if need_query:
        grads[0] = (grad_loss[:, None] * grad_query).to(ctx.dtypes[0])
    if need_positive:
        grads[1] = (grad_loss[:, None] * grad_positive).to(ctx.dtypes[1])
    if need_negatives:
        grads[2] = grad_negatives_op(
            grad_loss, query, negatives, lse, temperature, *ctx.options, *ids_and_mask
        ).to(ctx.dtypes[2])
    if need_temperature:
        grads[3] = sweep.temperature_grad(grad_loss, grad_scale, temperature).to(temperature.dtype)
    return tuple(grads)


info_nce_op.register_autograd(_op_backward, setup_context=_setup_context)


@torch.library.custom_op("mocofast::enqueue_", mutates_args=("queue", "pointer"))
def enqueue_op(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    """Does what `mocofast.ops.enqueue_` does, for checked arguments."""
    backend.backend_for(queue.device.type).enqueue_(queue, pointer, keys, normalize=normalize)


@torch.library.custom_op("mocofast::ema_update_", mutates_args=("targets",))
def ema_update_op(
    targets: list[Tensor], sources: list[Tensor], momentum: Tensor | None, scalar: float
) -> None:
    """Does what `mocofast.ops.ema_update_` does, for checked arguments of a single device.

    momentum: () or None, which takes `scalar`.
    """
    backend.backend_for(targets[0].device.type).ema_update_(
        targets, sources, scalar if momentum is None else momentum
    )


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, normalize: bool) -> None:
    """Calls the kernel of the queue's device, through an op while torch.compile traces."""
    if torch.compiler.is_compiling():
        enqueue_op(queue, pointer, keys, normalize)
    else:
        backend.backend_for(queue.device.type).enqueue_(queue, pointer, keys, normalize=normalize)


def ema_update_(
    targets: list[Tensor],
    sources: list[Tensor],
    momentum: float | Tensor,
) -> None:
    """Calls the kernel for tensors of a single device, through an op while torch.compile traces."""
    if torch.compiler.is_compiling():
        scalar, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
        ema_update_op(targets, sources, tensor, scalar)
    else:
        update = backend.backend_for(targets[0].device.type).ema_update_
        update(targets, sources, momentum)
