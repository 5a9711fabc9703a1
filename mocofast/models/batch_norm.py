"""Torchvision's residual blocks with BatchNorm, residual and ReLU in one call where that is a SplitBatchNorm2d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck

from mocofast.ops.batch_norm import ghost_batch_norm


class FusedBasicBlock(BasicBlock):
    """BasicBlock of the same state dict, whose bn1 and bn2 are SplitBatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(y), relu=True, residual=shortcut)


class FusedBottleneck(Bottleneck):
    """Bottleneck of the same state dict, whose bn1, bn2 and bn3 are SplitBatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        return self.bn3(self.conv3(y), relu=True, residual=shortcut)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
}


def fuse_blocks(module: nn.Module, norm: type[nn.Module]) -> None:
    """Turns torchvision's blocks inside `module` into those above, in place, where their BatchNorms are all `norm`.

    Hooks on the ReLU inside a block no longer run.
    """
    for block in module.modules():
        fused = FUSED.get(type(block))
        norms = [child for name, child in block.named_children() if name.startswith("bn")]
        if fused is not None and all(isinstance(child, norm) for child in norms):
            block.__class__ = fused


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that takes its statistics over parts of the batch, as if each part were on a GPU of its own.

    In training, sample n belongs to part n % num_splits, as in MoCo's CIFAR demo; running statistics become the mean
    over the parts of what each part would have made them. In eval mode it is an ordinary BatchNorm2d, and its
    state-dict names are BatchNorm2d's. The batch has to be divisible by num_splits in training (ValueError).
    `residual`, of the input's shape and type, is added to what BatchNorm gives, and `relu` rectifies the sum: on CUDA
    in one pass.
    """

    def __init__(
        self, num_features: int, num_splits: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.num_splits = num_splits

    def forward(self, x: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        if not self.training:
            y = super().forward(x)
            if residual is not None:
                y = y + residual
            return y.relu_() if relu else y
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        y = ghost_batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_splits,
            self.momentum,
            self.eps,
            relu,
            residual,
        )
        self.num_batches_tracked.add_(1)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


def split_batch_norm(module: nn.Module, num_splits: int) -> None:
    """Turns every BatchNorm2d inside `module` into a SplitBatchNorm2d, with its weights and statistics, in place;
    torchvision's residual blocks then give their additions and ReLUs to it.

    ValueError, before anything is changed, for one without weights, running statistics or a fixed momentum.
    """

    def make(old: nn.BatchNorm2d) -> SplitBatchNorm2d:
        if not old.affine or not old.track_running_stats or old.momentum is None:
            raise ValueError(
                f"bn_splits: expected BatchNorm2d with weights, running statistics and a momentum; got {old}"
            )
        return SplitBatchNorm2d(old.num_features, num_splits, old.eps, old.momentum)

    if replace_batch_norms(module, lambda child: type(child) is nn.BatchNorm2d, make):
        from mocofast.models.batch_norm import fuse_blocks

        fuse_blocks(module, SplitBatchNorm2d)


def replace_batch_norms(
    module: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[Any], _BatchNorm]
) -> bool:
    """Puts make(child) in the place of every `wanted` BatchNorm inside `module`, with the child's mode, weights and
    statistics; returns whether there were any. What `make` raises, it raises before anything is changed."""
    found: list[tuple[nn.Module, str, Any, _BatchNorm]] = [
        (parent, name, child, make(child))
        for parent in module.modules()
        for name, child in parent.named_children()
        if wanted(child)
    ]
    for parent, name, old, new in found:
        new.train(old.training)
        new.weight, new.bias = old.weight, old.bias
        new.running_mean, new.running_var = old.running_mean, old.running_var
        new.num_batches_tracked = old.num_batches_tracked
        setattr(parent, name, new)
    return bool(found)
