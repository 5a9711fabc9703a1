"""Connects the kernels of the sigmoid loss to autograd and to torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mocofast_kernels.cpu_sigmoid import SigmoidForward
from mocofast_kernels.cpu_vectors import softplus, wide, wide_dtype
from mocofast_kernels.exclusion import Exclusion
from torch import Tensor

from mocofast.ops import backend, sweep
from mocofast.ops.first_derivative import first_derivative
from mocofast.ops.ring import Ring


def siglip(query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, ring: Ring) -> Tensor:
    """Returns the loss of this rank's rows against the keys of all ranks, (N,).

    query, keys: (N, C). Row i of keys is the positive of row i of query.
    scale, bias: () on the device of the features.
    """
    with sweep.without_autocast(query.device.type):
        positive = (wide(query) * wide(keys)).sum(1) * scale + bias
        if torch.compiler.is_compiling() and ring.group is None:
            negatives, _, _ = siglip_negatives_op(query, keys, scale, bias)
        else:
            negatives = _negatives(query, keys, scale, bias, ring)
        return softplus(-positive) + negatives


@torch.compiler.disable
def _negatives(query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, ring: Ring) -> Tensor:
    sweep.refuse_transforms(query, keys, scale, bias)
    result: Tensor = _Negatives.apply(query, keys, scale, bias, ring)
    return result


class _Negatives(torch.autograd.Function):
    """The sum over the negatives of all ranks. Gradients of keys travel back to their owners."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, ring: Ring
    ) -> Tensor:
        kernels = backend.backend_for(query.device.type)
        total: SigmoidForward | None = None
        for owner, block in ring.blocks(keys):
            part = kernels.sigmoid_forward(query, bias, block, scale, ring.excluded(owner))
            if total is not None:
                part = SigmoidForward(*(a + b for a, b in zip(total, part)))
            total = part
        assert total is not None
        ctx.ring = ring
        ctx.save_for_backward(query, keys, scale, bias, total.weight, total.output)
        return total.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, scale, bias, *sums = ctx.saved_tensors
        ring: Ring = ctx.ring
        kernels = backend.backend_for(query.device.type)

        def part(owner: int, block: Tensor) -> Tensor:
            excluded = ring.excluded(owner)
            return kernels.sigmoid_grad_negatives(query, bias, block, scale, excluded, grad_loss)

        inputs = query, keys, scale, bias
        with torch.no_grad(), sweep.without_autocast(query.device.type):
            grads = _gradients(
                ctx.needs_input_grad, inputs, sums, grad_loss, lambda: ring.collect(keys, part)
            )
        if torch.is_grad_enabled():  # create_graph=True
            grads = first_derivative("siglip_loss", grads, (grad_loss, *inputs))
        return *grads, None


def _gradients(
    needed: Sequence[bool],
    inputs: Sequence[Tensor],
    sums: Sequence[Tensor],
    grad_loss: Tensor,
    of_keys: Callable[[], Tensor],
) -> list[Tensor | None]:
    """Returns the gradients by query, keys, scale and bias, each in its dtype, or None.

    sums: weight (N,) and output (N, C) of `SigmoidForward`. of_keys: computes the keys' gradient.
    """
    query, keys, scale, bias = inputs
    weight, output = sums
    grads: list[Tensor | None] = [None] * 4
    if needed[0]:
        grads[0] = (output * (grad_loss * scale)[:, None]).to(query.dtype)
    if needed[1]:
        grads[1] = of_keys().to(keys.dtype)
    if needed[2]:
        grads[2] = ((wide(query) * output).sum(1) * grad_loss).sum().to(scale.dtype)
    if needed[3]:
        grads[3] = (weight * grad_loss).sum().to(bias.dtype)
    return grads


# --- torch.compile: custom ops, opaque to the compiler, for the rows of one rank ---


@torch.library.custom_op("mocofast::siglip_negatives", mutates_args=())
def siglip_negatives_op(
    query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the fields of `SigmoidForward`. Key i is no negative of row i.

    query, keys: (N, C). scale, bias: ().
    """
    kernels = backend.backend_for(query.device.type)
    sums = kernels.sigmoid_forward(query, bias, keys, scale, Exclusion(len(query)))
    return sums.loss, sums.weight, sums.output


@siglip_negatives_op.register_fake
def _(query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = wide_dtype(query.dtype), query.shape[0]
    shapes = (rows,), (rows,), query.shape
    loss, weight, output = (query.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, weight, output


@torch.library.custom_op("mocofast::siglip_grad_keys", mutates_args=())
def siglip_grad_keys_op(
    query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, grad_loss: Tensor
) -> Tensor:
    """Returns the gradient by the keys, (N, C) float32 or float64. grad_loss: (N,)."""
    excluded = Exclusion(len(query))
    kernels = backend.backend_for(query.device.type)
    return kernels.sigmoid_grad_negatives(query, bias, keys, scale, excluded, grad_loss)


@siglip_grad_keys_op.register_fake
def _(query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, grad_loss: Tensor) -> Tensor:
    return keys.new_empty(keys.shape, dtype=wide_dtype(keys.dtype))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _op_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, weight, output = ctx.saved_tensors
    sums = weight, output
    return tuple(
        _gradients(
            ctx.needs_input_grad,
            inputs,
            sums,
            grad_loss,
            lambda: siglip_grad_keys_op(*inputs, grad_loss),
        )
    )


siglip_negatives_op.register_autograd(_op_backward, setup_context=_setup_context)
