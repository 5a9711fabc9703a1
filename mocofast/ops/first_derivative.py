"""Gradients of kernels that have no second derivative: double backward raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def first_derivative(
    op: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns `grads` as tensors whose differentiation raises RuntimeError.

    Without the error, double backward would silently give zero.

    op: name of the op for the message.
    grads: gradients. None stays None.
    inputs: tensors that the gradients depend on.

    Call under create_graph=True only.
    """
    return [None if grad is None else _FirstDerivative.apply(op, grad, *inputs) for grad in grads]


class _FirstDerivative(torch.autograd.Function):
    """Raises on double backward instead of silently giving zero. Forward is the identity."""

    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op} has no second derivative: "
            "its gradient cannot be differentiated (double backward)"
        )
