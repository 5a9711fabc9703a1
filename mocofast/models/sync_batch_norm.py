"""BatchNorm over the batches of all ranks together, on GPUs and on CPUs.

torch.nn.SyncBatchNorm does not run on CPUs. On GPUs, the host waits for the GPU at every layer,
because a rank may have no images. Here the host knows the images of all ranks, and never waits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mocofast.distributed import all_gather, rank_and_world_size, shares_of
from mocofast.models.batch_norm import replace_batch_norms

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d and 3d with statistics over the batches of all ranks in training.

    Input: (N, C, ...). N is the same on all ranks, or as `mocofast.distributed.sharing` tells, or a
    multiple of that. Weights, running statistics and state-dict names are BatchNorm's. With one
    process, or in eval mode, the layer is an ordinary BatchNorm. In train mode all ranks have to
    call forward and backward together.
    """

    def forward(self, input: Tensor) -> Tensor:
        rank, world_size = rank_and_world_size()
        if not self.training or world_size == 1:
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return _Function.apply(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.momentum,
            self.eps,
            _values_of_ranks(input, rank),
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must be (N, C, ...): got shape {tuple(input.shape)}")


def _values_of_ranks(x: Tensor, rank: int) -> tuple[int, ...]:
    """Returns the number of values of a channel on every rank."""
    counts = shares_of(len(x)).counts
    own = x.numel() // x.shape[1]
    return tuple(own * count // counts[rank] for count in counts)


class _Function(torch.autograd.Function):
    """Forward: gathers the statistics of all ranks. Backward: reduces two sums a channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        counts: tuple[int, ...],
    ) -> Tensor:
        if not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        gathered = all_gather(torch.stack(_moments(x, eps)).unsqueeze(0))  # (W, 2, C)
        means, variances = gathered.unbind(1)
        mean = _mean_over_ranks(means, counts)
        variance = _mean_over_ranks(variances + (means - mean).square(), counts)
        count = sum(counts)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        ctx.counts = counts
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        grad = grad.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        sums = _gradient_sums(grad, x, mean, inverse_std)  # (2, C)
        grad_weight = grad_bias = None
        if weight is not None:
            grad_weight = (sums[1] * inverse_std).to(weight.dtype)
            grad_bias = sums[0].to(weight.dtype)
        # Only a copy is summed over ranks: gradients of weights stay this rank's own.
        totals = sums.clone()
        dist.all_reduce(totals)
        grad_x = _gradient(grad, x, mean, inverse_std, weight, totals, ctx.counts)
        return grad_x, grad_weight, grad_bias, *[None] * 5


def _mean_over_ranks(values: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Returns the mean (C,) over all values. values: (W, C), the means of ranks."""
    if len(set(counts)) == 1:
        return values.mean(0)
    return torch.einsum("wc,w->c", values, values.new_tensor(counts) / sum(counts))


def _moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns mean (C,) and biased variance (C,) of this rank, float32 or float64."""
    if x.is_cuda:
        mean, inverse_std = torch.batch_norm_stats(x, eps)
        return mean, inverse_std.pow(-2) - eps
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    return mean, variance


def _gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    """Returns (2, C): sums of grad and of grad * (x - mean) over this rank's batch and pixels."""
    if x.is_cuda:
        wanted = (True, False, False)
        return torch.stack(
            torch.batch_norm_backward_reduce(grad, x, mean, inverse_std, None, *wanted)[:2]
        )
    over = [dim for dim in range(x.dim()) if dim != 1]
    wide = grad.to(mean.dtype)
    return torch.stack([wide.sum(over), (wide * (x - _per_channel(mean, x))).sum(over)])


def _gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    counts: tuple[int, ...],
) -> Tensor:
    """Returns the gradient of x. sums: (2, C), as `_gradient_sums` returns, over all ranks."""
    if x.is_cuda:
        # The kernel takes the sum of the counts. A tensor of one value launches one fill.
        total = torch.full((1,), sum(counts), dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            grad, x, mean, inverse_std, weight, sums[0], sums[1], total
        )
    mean_grad, mean_product = (sums / sum(counts)).unbind()
    scale = inverse_std if weight is None else inverse_std * weight
    centred = x - _per_channel(mean, x)
    slope = _per_channel(mean_product * inverse_std.square(), x)
    return ((grad - _per_channel(mean_grad, x) - centred * slope) * _per_channel(scale, x)).to(
        x.dtype
    )


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def sync_batch_norm(module: nn.Module) -> None:
    """Replaces every BatchNorm inside `module` by a SyncBatchNorm, in place.

    Keeps weights, statistics and modes.
    Raises ValueError for a BatchNorm without running statistics or a fixed momentum. After an error
    nothing is changed.
    """

    def make(old: _BatchNorm) -> SyncBatchNorm:
        if not old.track_running_stats or old.momentum is None:
            raise ValueError(
                f"sync_bn: expected BatchNorm with running statistics and a momentum; got {old}"
            )
        return SyncBatchNorm(old.num_features, old.eps, old.momentum, old.affine)

    replace_batch_norms(module, lambda child: isinstance(child, BATCH_NORMS), make)
