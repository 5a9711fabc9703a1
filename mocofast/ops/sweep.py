"""Calls the kernels of InfoNCE: the sweep over the negatives, and the gradient by the negatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mocofast_kernels.cpu import InfoNCEForward
from mocofast_kernels.exclusion import Exclusion
from torch import Tensor
from torch.autograd import forward_ad

from mocofast.ops import backend

_functorch: Any = torch._C._functorch
_WAY_OUT = "no forward mode: take the gradient by loss.backward() or torch.autograd.grad"


class Options(NamedTuple):
    """Arguments of the kernels other than tensors and temperature."""

    normalize: bool
    normalize_negatives: bool
    return_rank: bool
    dot_dtype: torch.dtype


def dot_dtype(*inputs: Tensor) -> torch.dtype:
    """Returns the dtype of products: the autocast dtype if autocast is on, else the promoted one.

    Products of float64 stay float64, as autocast leaves them.
    """
    promoted = inputs[0].dtype
    for other in inputs[1:]:
        if other.dtype != promoted:
            promoted = torch.promote_types(promoted, other.dtype)
    device_type = inputs[0].device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return promoted


def forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float | Tensor,
    options: Options,
    excluded: Exclusion,
    compute_grad: bool,
    only_query: bool = False,
    mean: bool = False,
) -> InfoNCEForward:
    """Runs `infonce_forward` of the device, as `mocofast_kernels.cpu` documents it."""
    with without_autocast(query.device.type):
        return backend.backend_for(query.device.type).infonce_forward(
            query,
            positive,
            negatives,
            temperature,
            normalize=options.normalize,
            normalize_negatives=options.normalize_negatives,
            exclude_period=excluded.period,
            return_rank=options.return_rank,
            dot_dtype=options.dot_dtype,
            query_ids=excluded.query_ids,
            key_ids=excluded.key_ids,
            mask=excluded.mask,
            compute_grad=compute_grad,
            only_query=only_query,
            mean=mean,
        )


def grad_negatives(
    grad_loss: Tensor,
    query: Tensor,
    negatives: Tensor,
    lse: Tensor,
    temperature: float | Tensor,
    options: Options,
    excluded: Exclusion,
) -> Tensor:
    """Runs `infonce_grad_negatives` of the device. grad_loss: (N,)."""
    with without_autocast(query.device.type):
        return backend.backend_for(query.device.type).infonce_grad_negatives(
            grad_loss,
            query.detach(),
            negatives.detach(),
            lse,
            temperature,
            normalize=options.normalize,
            normalize_negatives=options.normalize_negatives,
            dot_dtype=options.dot_dtype,
            exclude_period=excluded.period,
            query_ids=excluded.query_ids,
            key_ids=excluded.key_ids,
            mask=excluded.mask,
        )


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off: the CPU path would otherwise compute float32 products in bfloat16."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def temperature_grad(grad_loss: Tensor, grad_scale: Tensor, temperature: Tensor) -> Tensor:
    """Returns dL/dT, (), from the rows' gradients dL/d(1/T), (N,)."""
    value = temperature if temperature.dtype == torch.float64 else temperature.float()
    return -(grad_loss * grad_scale).sum() / value.square()


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Returns the losses of rows, (N,), reduced by "mean", "sum" or "none"."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def refuse_transforms(*inputs: Tensor | None) -> None:
    """Raises RuntimeError under transforms of torch.func, and for dual numbers (forward mode).

    The gradient is computed by kernels, which carry neither.
    """
    dual = forward_ad._current_level >= 0 and any(  # unpack_dual fails outside a level
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    )
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "siglip_loss, and losses of a group of ranks, have no transforms of torch.func and "
            f"{_WAY_OUT}"
        )


def under_transforms() -> bool:
    """Says whether a transform of torch.func, or forward mode, is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_wrapped(*inputs: Tensor | None) -> bool:
    """Says whether a transform of torch.func wraps an input, as vmap does.

    Raises RuntimeError where a derivative is taken by an input. For calls under transforms, or in
    forward mode.
    """
    given = [x for x in inputs if x is not None]
    if any(_has_derivative(level) for x in given for level in _levels(x)):
        raise RuntimeError(
            "of the transforms of torch.func the losses of mocofast.ops have vmap alone, without a "
            f"gradient, and {_WAY_OUT}"
        )
    return any(map(_functorch.is_functorch_wrapped_tensor, given))


def _levels(x: Tensor) -> Iterator[Tensor]:
    """Yields a tensor, and the tensor inside of every transform that wraps the tensor."""
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def _has_derivative(level: Tensor) -> bool:
    tracked: bool = _functorch.is_gradtrackingtensor(level)  # by torch.func.grad or torch.func.jvp
    if level.requires_grad and (tracked or torch.is_grad_enabled()):
        return True
    if forward_ad._current_level < 0:
        return False
    if _functorch.is_functorch_wrapped_tensor(level):
        return tracked
    return forward_ad.unpack_dual(level).tangent is not None
