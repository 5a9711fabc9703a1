"""Connects the blocked kernels of the sigmoid loss to autograd."""

from __future__ import annotations

from typing import Any

import torch
from mocofast_kernels.cpu_sigmoid import SigmoidForward, sigmoid_forward, sigmoid_grad_negatives
from mocofast_kernels.cpu_vectors import softplus, wide
from mocofast_kernels.exclusion import Exclusion
from torch import Tensor

from mocofast.ops import sweep
from mocofast.ops.first_derivative import first_derivative
from mocofast.ops.ring import Ring


def siglip(query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, ring: Ring) -> Tensor:
    """Returns the loss of this rank's rows against the keys of all ranks, (N,).

    query, keys: (N, C). Row i of keys is the positive of row i of query.
    scale, bias: () on the device of the features.
    """
    sweep.refuse_transforms(query, keys, scale, bias)
    with sweep.without_autocast(query.device.type):
        positive = (wide(query) * wide(keys)).sum(1) * scale + bias
        negatives: Tensor = _Negatives.apply(query, keys, scale, bias, ring)
        return softplus(-positive) + negatives


class _Negatives(torch.autograd.Function):
    """The sum over the negatives of all ranks. Gradients of keys travel back to their owners."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, ring: Ring
    ) -> Tensor:
        total: SigmoidForward | None = None
        for owner, block in ring.blocks(keys):
            part = sigmoid_forward(query, bias, block, scale, _excluded(ring, owner))
            if total is not None:
                part = SigmoidForward(*(a + b for a, b in zip(total, part)))
            total = part
        assert total is not None
        ctx.ring = ring
        ctx.save_for_backward(query, keys, scale, bias, total.weight, total.output)
        return total.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, scale, bias, weight, output = ctx.saved_tensors
        need_query, need_keys, need_scale, need_bias, _ = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 4
        with torch.no_grad(), sweep.without_autocast(query.device.type):
            if need_query:
                grads[0] = (output * (grad_loss * scale)[:, None]).to(query.dtype)
            if need_keys:

                def part(owner: int, block: Tensor) -> Tensor:
                    excluded = _excluded(ctx.ring, owner)
                    return sigmoid_grad_negatives(query, bias, block, scale, excluded, grad_loss)

                grads[1] = ctx.ring.collect(keys, part).to(keys.dtype)
            if need_scale:
                grads[2] = ((wide(query) * output).sum(1) * grad_loss).sum().to(scale.dtype)
            if need_bias:
                grads[3] = (weight * grad_loss).sum().to(bias.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            grads = first_derivative("siglip_loss", grads, (grad_loss, query, keys, scale, bias))
        return *grads, None


def _excluded(ring: Ring, owner: int) -> Exclusion:
    """Returns what the rows of this rank leave out of a block: row i, in the own block."""
    return Exclusion(ring.counts[ring.rank] if owner == ring.rank else 0)
