"""Connects InfoNCE's kernels to autograd.

Eager mode calls the kernels directly, compiled code calls them through custom ops.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from mocofast_kernels.exclusion import Exclusion
from torch import Tensor

from mocofast.ops import custom_ops, sweep
from mocofast.ops.first_derivative import first_derivative
from mocofast.ops.known_gradients import as_mean, is_unit
from mocofast.ops.sweep import Options, is_wrapped, reduced, under_transforms


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool,
    normalize_negatives: bool,
    excluded: Exclusion,
    return_rank: bool,
    reduction: str,
) -> tuple[Tensor, Tensor | None]:
    """Returns the loss, (N,) or reduced to (), and the positive rank (N,) int32 or None.

    Expects checked arguments, as `mocofast_kernels.cpu.infonce_forward` documents them. The loss
    is float32, or float64 for inputs of float64.
    """
    dot_dtype = sweep.dot_dtype(query, positive, negatives)
    options = Options(normalize, normalize_negatives, return_rank, dot_dtype)
    scalar, tensor = (0.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)

    # The forward sweep computes all gradients except the negatives' gradient.
    needs_forward_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, positive, tensor)
    )
    needs_negatives_grad = torch.is_grad_enabled() and negatives.requires_grad

    # Compiled code calls the op, and so does vmap, which the op takes apart. Eager mode avoids the
    # op: its wrapper costs tens of microseconds.
    through_op = torch.compiler.is_compiling()
    if under_transforms():
        through_op = through_op or is_wrapped(query, positive, negatives, tensor, *excluded[1:])
    if through_op:
        loss, _, positive_rank, _, _, _ = custom_ops.info_nce_op(
            query, positive, negatives, tensor, scalar, *options, *excluded, needs_forward_grad
        )
        return reduced(loss, reduction), positive_rank if return_rank else None
    arguments = query, positive, negatives
    if needs_forward_grad or needs_negatives_grad:
        return _InfoNCE.apply(*arguments, tensor, scalar, options, excluded, reduction)
    mean = reduction == "mean"
    result = sweep.forward(
        *arguments, temperature, options, excluded, compute_grad=False, mean=mean
    )
    return result.loss if mean else reduced(result.loss, reduction), result.rank


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
        options: Options,
        excluded: Exclusion,
        reduction: str,
    ) -> tuple[Tensor, Tensor | None]:
        need_query, need_positive, need_negatives, need_temperature = ctx.needs_input_grad[:4]
        mean = reduction == "mean"
        result = sweep.forward(
            query,
            positive,
            negatives,
            scalar if temperature is None else temperature,
            options,
            excluded,
            compute_grad=need_query or need_positive or need_temperature,
            only_query=not (need_positive or need_negatives or need_temperature),
            mean=mean,
        )
        if result.rank is not None:
            ctx.mark_non_differentiable(result.rank)
        ctx.options, ctx.scalar, ctx.mean, ctx.rows = options, scalar, mean, len(query)
        ctx.period = excluded.period
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
            *(excluded[1:] if need_negatives else (None,) * 3),
        )
        # Reducing inside the function spares autograd a node.
        return as_mean(result.loss) if mean else reduced(result.loss, reduction), result.rank

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_query, grad_positive, grad_scale, lse, *inputs = ctx.saved_tensors
        query, positive, negatives, temperature, *ids_and_mask = inputs
        grads: list[Tensor | None] = [None] * 4
        # Gradients are recorded with create_graph=True only.
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            # Gradients known since forward: of the mean, or of the rows. grad_loss is () if all
            # rows share the gradient, else (N,).
            column = grad_loss[:, None] if grad_loss.dim() else grad_loss
            for i, grad in enumerate((grad_query, grad_positive)):
                if grad is not None:
                    grads[i] = (grad if is_unit(grad_loss) else grad * column).to(ctx.dtypes[i])
            # Second sweep over the logits.
            if lse is not None:
                row_gradient = grad_loss / ctx.rows if ctx.mean else grad_loss
                grads[2] = sweep.grad_negatives(
                    row_gradient.expand(ctx.rows),
                    query,
                    negatives,
                    lse,
                    ctx.scalar if temperature is None else temperature,
                    ctx.options,
                    Exclusion(ctx.period, *ids_and_mask),
                ).to(ctx.dtypes[2])
            if grad_scale is not None:
                grads[3] = sweep.temperature_grad(grad_loss, grad_scale, temperature).to(
                    temperature.dtype
                )
        if torch.is_grad_enabled():  # create_graph=True
            grads = first_derivative(
                "info_nce", grads, (grad_loss, query, positive, negatives, temperature)
            )
        return *grads, None, None, None, None
