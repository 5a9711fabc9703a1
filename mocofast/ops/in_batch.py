"""Connects the losses of small batches on a CPU to autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from mocofast_kernels import cpu_in_batch
from mocofast_kernels.cpu_compiled_batch import InBatch, scaled
from mocofast_kernels.cpu_library import is_watched
from mocofast_kernels.remembered import KINDS
from torch import Tensor

from mocofast.ops import sweep
from mocofast.ops.first_derivative import first_derivative
from mocofast.ops.transforms import is_transformed

Loss = tuple[Tensor, Tensor | None]


def small_loss(
    query: Tensor,
    key: Tensor | None,
    scale: float | Tensor,
    *,
    normalize: bool,
    inverse: bool = False,
    both_ways: bool = False,
    return_rank: bool = False,
    reduction: str = "mean",
) -> Loss | None:
    """Returns the mean loss () and the ranks (N,) or None, of a small batch that needs gradients.

    inverse: `scale` is T instead of 1 / T.
    Other arguments: as for `cpu_in_batch.in_batch`. None for all other calls.
    """
    if reduction != "mean" or not _is_small(query, key, scale):
        return None
    if inverse:
        scale = _inverse(scale)
    with torch.no_grad(), sweep.without_autocast("cpu"):
        found = cpu_in_batch.in_batch(
            query,
            key,
            _number(scale),
            normalize=normalize,
            both_ways=both_ways,
            return_rank=return_rank,
            need_key=key is not None and key.requires_grad,
        )
    if found is None:
        return None
    return _InBatch.apply("info_nce", found, query, key, scale, None), found.rank


def small_supervised(
    features: Tensor, labels: Tensor, temperature: float | Tensor, normalize: bool
) -> Tensor | None:
    """Returns the mean supervised loss () of a small batch that needs gradients, or None.

    temperature: T. Other arguments: as for `cpu_in_batch.supervised`.
    """
    if not _is_small(features, labels, temperature):
        return None
    scale = _inverse(temperature)
    with torch.no_grad(), sweep.without_autocast("cpu"):
        found = cpu_in_batch.supervised(features, labels, _number(scale), normalize=normalize)
    if found is None:
        return None
    loss: Tensor = _InBatch.apply("supervised_contrastive", found, features, None, scale, None)
    return loss


def small_sigmoid(
    query: Tensor, key: Tensor, scale: float | Tensor, bias: float | Tensor
) -> Tensor | None:
    """Returns SigLIP's mean loss () of a small batch that needs gradients, or None.

    Arguments: as for `cpu_in_batch.sigmoid`.
    """
    if not _is_small(query, key, scale, bias):
        return None
    with torch.no_grad(), sweep.without_autocast("cpu"):
        numbers = _number(scale), _number(bias)
        found = cpu_in_batch.sigmoid(query, key, *numbers, need_key=key.requires_grad)
    if found is None:
        return None
    loss: Tensor = _InBatch.apply("siglip_loss", found, query, key, scale, bias)
    return loss


def _is_small(query: Tensor, *others: Tensor | float | None) -> bool:
    """Says whether a call is of a small batch on a CPU, in eager mode, and needs gradients."""
    tensors = [x for x in (query, *others) if isinstance(x, Tensor)]
    return (
        query.device.type == "cpu"
        and len(query) ** 2 <= cpu_in_batch.LOGITS
        and not torch.compiler.is_compiling()
        and not sweep.under_transforms()  # the general way knows which are refused
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in tensors)
        # Fake tensors and tracers have no values to look at.
        and not is_watched()
        and KINDS.issuperset(map(type, tensors))
    )


def _inverse(temperature: float | Tensor) -> float | Tensor:
    """Returns 1 / T. In the 16 bits of a tensor it would be that of another temperature."""
    return 1.0 / (temperature.double() if isinstance(temperature, Tensor) else temperature)


def _number(x: float | Tensor) -> float:
    return float(x.detach()) if isinstance(x, Tensor) else x


class _InBatch(torch.autograd.Function):
    """Returns the loss of a result, and its gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, op: str, found: InBatch, *inputs: Any) -> Tensor:
        """Takes query, key, scale and bias as inputs: tensors, numbers or None."""
        grads = found.grad_query, found.grad_key, found.grad_scale, found.grad_bias
        needs: Sequence[bool] = ctx.needs_input_grad[2:]
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs)))
        # The inputs serve the error of a second derivative alone.
        ctx.op, ctx.inputs = op, [x for x in inputs if isinstance(x, Tensor)]
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        return found.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Of `is_grads_batched` the numbers cannot be read.
        batched = torch._C._functorch.is_legacy_batchedtensor(grad_loss)
        multiply = torch.mul if batched or is_transformed() else scaled
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            grads = [
                None if grad is None else multiply(grad, grad_loss).to(dtype)
                for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
            ]
        if torch.is_grad_enabled():  # create_graph=True
            grads = first_derivative(ctx.op, grads, (grad_loss, *ctx.inputs))
        return None, None, *grads
