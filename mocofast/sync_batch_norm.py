"""BatchNorm over the batches of all ranks together, on GPUs and on CPUs (PyTorch's own refuses the latter)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules._functions import SyncBatchNorm as _GPUSyncBatchNorm  # what torch.nn.SyncBatchNorm runs
from torch.nn.modules.batchnorm import _BatchNorm

from mocofast.distributed import rank_and_world_size

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d and 3d, whose statistics in training are those of all ranks' batches as one.

    Input (N, C, ...), N the same on all ranks. Weights, running statistics and state-dict names are BatchNorm's. With
    one process, or in eval mode, it is an ordinary BatchNorm; a rank in train mode waits for all others.
    """

    def forward(self, input: Tensor) -> Tensor:
        _, world_size = rank_and_world_size()
        if not self.training or world_size == 1:
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if input.is_cuda:
            return _GPUSyncBatchNorm.apply(
                input,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.eps,
                self.momentum,
                dist.group.WORLD,
                world_size,
            )
        return self._composed(input, world_size)

    def _composed(self, input: Tensor, world_size: int) -> Tensor:
        """Sums over ranks are differentiable: their gradients are summed over ranks in turn."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        x = input.to(self.running_mean.dtype)  # float32 where autocast made bfloat16
        over = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * world_size
        mean = all_reduce(x.sum(over)) / count
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(over)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = torch.addcmul(self.bias.view(shape), y, self.weight.view(shape))
        return y.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must be (N, C, ...): got shape {tuple(input.shape)}")


def sync_batch_norm(module: nn.Module) -> None:
    """Turns every BatchNorm inside `module` into a SyncBatchNorm, with its weights and statistics, in place.

    ValueError, before anything is changed, for one without running statistics or a fixed momentum.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, BATCH_NORMS)
    ]
    for _, _, child in found:
        if not child.track_running_stats or child.momentum is None:
            raise ValueError(f"sync_bn: expected BatchNorm with running statistics and a momentum; got {child}")
    for parent, name, child in found:
        sync = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
        sync.train(child.training)
        sync.weight, sync.bias = child.weight, child.bias
        sync.running_mean, sync.running_var = child.running_mean, child.running_var
        sync.num_batches_tracked = child.num_batches_tracked
        setattr(parent, name, sync)
