"""BatchNorm over splits of a batch, composed of PyTorch's BatchNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pytorch_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_splits: int,
    momentum: float,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    """Ghost BatchNorm of PyTorch operators, with the arguments of `ghost_batch_norm`."""
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))
    # In channels-last memory a loop over splits, which fit in cache, is faster forward, but much
    # slower backward.
    split_by_split = (
        x.is_contiguous(memory_format=torch.channels_last)
        and not tracked
        and not torch.compiler.is_compiling()
    )
    if num_splits == 1:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    else:
        norm = _split_by_split if split_by_split else splits_as_channels
        y = norm(x, weight, bias, running_mean, running_var, num_splits, momentum, eps)
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def _split_by_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_splits: int,
    momentum: float,
    eps: float,
) -> Tensor:
    """A loop over the splits, in channels-last memory, without gradients."""
    y = torch.empty_like(x)
    means, variances = running_mean.repeat(num_splits, 1), running_var.repeat(num_splits, 1)
    for split, (mean, variance) in enumerate(zip(means, variances)):
        values = x[split::num_splits].contiguous(memory_format=torch.channels_last)
        y[split::num_splits] = F.batch_norm(
            values, mean, variance, weight, bias, True, momentum, eps
        )
    running_mean.copy_(means.mean(0))
    running_var.copy_(variances.mean(0))
    return y


def splits_as_channels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_splits: int,
    momentum: float,
    eps: float,
) -> Tensor:
    """A single BatchNorm over num_splits * C channels, so that splits stay apart."""
    channels_last = torch.channels_last
    if torch.compiler.is_compiling() and x.is_contiguous(memory_format=channels_last):
        # PyTorch's compiler expects other strides of a gradient than BatchNorm gives ("view size is
        # not compatible", torch 2.11, backend aot_eager).
        y = splits_as_channels(
            x.contiguous(), weight, bias, running_mean, running_var, num_splits, momentum, eps
        )
        return y.contiguous(memory_format=channels_last)
    means, variances = running_mean.repeat(num_splits), running_var.repeat(num_splits)
    folded = F.batch_norm(
        _splits_to_channels(x, num_splits),
        means,
        variances,
        weight.repeat(num_splits),
        bias.repeat(num_splits),
        True,
        momentum,
        eps,
    )
    running_mean.copy_(means.view(num_splits, -1).mean(0))
    running_var.copy_(variances.view(num_splits, -1).mean(0))
    return _channels_to_splits(folded, x, num_splits)


def _splits_to_channels(x: Tensor, splits: int) -> Tensor:
    """Moves sample n into channel group n % splits: (N, C, H, W) -> (N/splits, splits*C, H, W).

    NCHW memory needs no copy, only a view. In channels-last memory rows of C values are re-ordered,
    before and after the BatchNorm.
    """
    n, c, h, w = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.reshape(n // splits, splits * c, h, w)
    rows = x.permute(0, 2, 3, 1).view(n // splits, splits, h, w, c)
    return rows.permute(0, 2, 3, 1, 4).reshape(n // splits, h, w, splits * c).permute(0, 3, 1, 2)


def _channels_to_splits(folded: Tensor, x: Tensor, splits: int) -> Tensor:
    """Inverts `_splits_to_channels`. The result has the memory format of `x`."""
    n, c, h, w = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last):
        return folded.reshape(n, c, h, w)
    rows = folded.permute(0, 2, 3, 1).reshape(n // splits, h, w, splits, c)
    # With a single sample per split, reshape alone would return a view of the folded memory.
    return rows.permute(0, 3, 1, 2, 4).contiguous().view(n, h, w, c).permute(0, 3, 1, 2)
