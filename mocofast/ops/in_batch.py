"""Connects the losses of small batches on a CPU to autograd."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from mocofast_kernels import cpu_in_batch
from mocofast_kernels.cpu_in_batch import InBatch
from torch import Tensor
from torch.autograd import forward_ad

from mocofast.ops import sweep
from mocofast.ops.first_derivative import first_derivative

Loss = tuple[Tensor, Tensor | None]


def small_loss(
    query: Tensor,
    key: Tensor | None,
    scale: float | Tensor,
    *,
    normalize: bool,
    both_ways: bool = False,
    return_rank: bool = False,
    reduction: str = "mean",
) -> Loss | None:
    """Returns the mean loss () and the ranks (N,) or None, of a small batch that needs gradients.

    Arguments: as for `cpu_in_batch.in_batch`. None for all other calls.
    """
    tensors = [x for x in (query, key, scale) if isinstance(x, Tensor)]
    if (
        reduction != "mean"
        or query.device.type != "cpu"
        or len(query) ** 2 > cpu_in_batch.LOGITS
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # `autograd.info_nce` refuses these
        or forward_ad._current_level >= 0
        or not torch.is_grad_enabled()
        or not any(x.requires_grad for x in tensors)
    ):
        return None
    with torch.no_grad(), sweep.without_autocast("cpu"):
        found = cpu_in_batch.in_batch(
            query,
            key,
            float(scale.detach()) if isinstance(scale, Tensor) else scale,
            normalize=normalize,
            both_ways=both_ways,
            return_rank=return_rank,
            need_key=key is not None and key.requires_grad,
        )
    if found is None:
        return None
    return _InBatch.apply(query, key, scale, found), found.rank


class _InBatch(torch.autograd.Function):
    """Returns the loss of a result, and its gradients in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor | None, scale: float | Tensor, found: InBatch
    ) -> Tensor:
        needs = ctx.needs_input_grad
        grads = found.grad_query, found.grad_key, found.grad_scale
        # Inputs are saved for the error of a second derivative alone.
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs)))
        ctx.inputs = [x for x in (query, key, scale) if isinstance(x, Tensor)]
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in (query, key, scale)]
        return found.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            grads = [
                None if grad is None else (grad * grad_loss).to(dtype)
                for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
            ]
        if torch.is_grad_enabled():  # create_graph=True
            grads = first_derivative("info_nce", grads, (grad_loss, *ctx.inputs))
        return *grads, None
