"""Rows of vectors on CPUs: norms, unit vectors, and gradients through the normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2E = 1.0 / math.log(2.0)
EPS = 1e-12  # smallest divisor of a normalised vector, as in torch.nn.functional.normalize


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums: float64 for float64, and float32 for all other types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def common_wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Returns the dtype, float32 at least, that holds the values of all dtypes.

    PyTorch promotes no types of 8 bits.
    """
    result = torch.float32
    for dtype in dtypes:
        if dtype.itemsize > 1:
            result = torch.promote_types(result, dtype)
    return result


def wide(x: Tensor) -> Tensor:
    """Returns x in the dtype of sums."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that a gradient is stored in until the incoming gradient is known.

    That is the dtype of the input. float16 would lose the small gradients of a mean, before the
    factor of a gradient scaler reaches them, so float32 takes its place.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def softplus(x: Tensor) -> Tensor:
    """Returns log(1 + e^x), exact in float64 too: PyTorch's default returns x from 20 on."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def clamped_norm(rows: Tensor) -> Tensor:
    """Returns max(norm, EPS) of every row. rows: (M, C). Returns (M, 1)."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(EPS)


def unit_rows(vectors: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Returns vectors (M, C) in float32 or float64, and their norms (M, 1) or None.

    normalize: divide the vectors by the norms.
    """
    vectors = wide(vectors)
    if not normalize:
        return vectors, None
    norm = clamped_norm(vectors)
    return vectors / norm, norm


def through_normalize(grad: Tensor, along: Tensor, unit: Tensor, norm: Tensor | None) -> Tensor:
    """Returns the gradient by a vector from the gradient by unit = vector / norm.

    grad, unit: (M, C).
    along: (M, 1), grad . unit. Overwritten.
    norm: (M, 1), or None for vectors used as given.
    """
    if norm is None:
        return grad
    # Up to EPS the divisor is a constant, so the gradient has no component along the vector.
    along.div_(torch.threshold(norm, EPS, math.inf))
    return grad.div(norm).addcmul_(unit, along, value=-1)
