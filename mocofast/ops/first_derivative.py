"""Gradients that refuse a second derivative, as kernels without one have to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def first_derivative(
    op: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns `grads` such that differentiating them raises RuntimeError instead of silently giving zero.

    op: the name in the message. inputs: tensors that the gradients depend on. Call under create_graph=True only.
    """
    return [None if grad is None else _FirstDerivative.apply(op, grad, *inputs) for grad in grads]


class _FirstDerivative(torch.autograd.Function):
    """Identity that stands where the graph of the gradient would be."""

    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op} has no second derivative: its gradient cannot be differentiated (double backward)"
        )
