"""Losses over the pairs of a small batch by the compiled library, in the calling thread.

One call (`in_batch.c`) gives the loss and all gradients: some 30 operators of PyTorch cost two
microseconds each, and a thread of the pool a change of threads (docs/log.md).
"""

from __future__ import annotations

import ctypes
import enum
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocofast_kernels import cpu_ranks, cpu_sweep
from mocofast_kernels.cpu_library import addresses, function, takes
from mocofast_kernels.cpu_memory import GRAIN
from mocofast_kernels.cpu_sweep import PRODUCTS

RANGE = 100.0  # largest difference of two logits in bits: exponentials and sums are normal numbers

_Loss = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    *[ctypes.c_void_p] * 3,
    *[ctypes.c_int64] * 2,
    ctypes.c_int,
    *[ctypes.c_double] * 3,
    ctypes.c_float,
    *[ctypes.c_void_p] * 6,
)
_Scale = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float)


class Kind(enum.IntEnum):
    """A loss, as in in_batch.c."""

    PAIRS = 0  # InfoNCE of every query against the keys of all other queries
    BOTH_WAYS = 1  # the mean of this and of the loss of keys against queries (CLIP)
    VIEWS = 2  # NT-Xent: views a, then views b, are queries and keys
    LABELS = 3  # supervised: queries are keys, and rows with the same label are positives
    SIGMOID = 4  # SigLIP


class InBatch(NamedTuple):
    """The mean loss and its gradients. Gradients may be None unless asked for."""

    loss: Tensor  # ()
    rank: Tensor | None  # (N,) int32: negatives that score as high as the positive, or higher
    grad_query: Tensor | None  # (N, C)
    grad_key: Tensor | None  # (N, C)
    grad_scale: Tensor | None  # (): by the factor of the dot products, 1 / T
    grad_bias: Tensor | None = None  # (): of SigLIP


def serves(query: Tensor, key: Tensor | None) -> bool:
    """Says whether `compiled_batch` takes the features.

    Not for other tensors than contiguous ones of float32, bfloat16 and float16 on a CPU, for many
    products, and where the library or its instructions are missing. The answer does not depend on
    the number of threads.
    """
    fit = takes(query) and (key is None or takes(key))
    return fit and len(query) * query.numel() <= PRODUCTS and _compiled() is not None


def compiled_batch(
    kind: Kind,
    query: Tensor,
    key: Tensor | None,
    scale: float,
    *,
    bias: float = 0.0,
    labels: Tensor | None = None,
    normalize: bool = False,
    return_rank: bool = False,
    need_key: bool = False,
) -> InBatch | None:
    """Returns a loss of a batch that `serves` takes, and its gradients.

    query, key: (N, C). key: None for VIEWS and LABELS.
    scale, bias: of the dot products.
    labels: (N,) int64, contiguous, of LABELS.
    normalize: divide rows by their L2 norms first. Not for SIGMOID.
    return_rank: also count negatives, for losses one way.
    need_key: compute the gradient of the keys.

    Returns None where logits lie far apart or are not finite, but for SIGMOID. Gradients are
    float32.
    """
    x = query.float()
    y = x if key is None else key.float()
    grad = torch.empty_like(x)
    grad_key = torch.empty_like(y) if need_key else None
    loss, grad_scale = x.new_empty(()), x.new_empty(())
    grad_bias = x.new_empty(()) if kind == Kind.SIGMOID else None
    rank = x.new_empty(len(x), dtype=torch.int32) if return_rank else None
    given, numbers = addresses(x, y, labels), (scale, bias, RANGE)
    outputs = addresses(loss, grad, grad_key, grad_scale, grad_bias, rank)
    tie = cpu_ranks.tie_share(x.shape[1])
    done = _compiled()(kind, *given, *x.shape, normalize, *numbers, tie, *outputs)
    if not done:
        raise MemoryError(f"no memory for the logits of {len(x)} rows")
    return None if done < 0 else InBatch(loss, rank, grad, grad_key, grad_scale, grad_bias)


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Returns grad x factor, computed in the calling thread.

    grad: a gradient of `compiled_batch`, or another tensor. factor: ().

    PyTorch divides many numbers among its threads. Since their last operation they have gone to
    sleep, and beside busy processes they wake a time slice late.
    """
    scale = _scale()
    if (
        grad.numel() <= GRAIN
        or scale is None
        or {grad.dtype, factor.dtype} != {torch.float32}
        or not grad.is_contiguous()
        or not grad.is_cpu
    ):
        return grad * factor
    result = torch.empty_like(grad)
    scale(result.data_ptr(), grad.data_ptr(), grad.numel(), factor.item())
    return result


@functools.cache
def _scale() -> Any:
    return function(_Scale, "in_batch_scale")


@functools.cache
def _compiled() -> Any:
    return cpu_sweep.wide_function(_Loss, "in_batch_loss")
