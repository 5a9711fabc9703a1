"""BatchNorm over splits of the batch, and residual blocks that use its fused addition and ReLU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mocofast_kernels.cpu_ghost_bn import normalises
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mocofast.models.encoders import TinyBlock
from mocofast.models.tracing import is_traced, whole_call
from mocofast.ops.batch_norm import ghost_batch_norm


class SplitBatchNorm(_BatchNorm):
    """BatchNorm over splits of the batch, as if every split were on a separate GPU.

    In training, sample n belongs to split n % num_splits, as in MoCo's CIFAR demo. Every split
    updates a copy of the running statistics, and the mean of the copies is kept.
    In eval mode the layer is an ordinary BatchNorm. The state-dict names are BatchNorm's.

    forward(x, relu, residual):
        x: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), as the class says.
        residual: added to the result of BatchNorm, same shape and dtype as x.
        relu: whether a ReLU follows the addition. On CUDA, all three run in one pass.
    Raises ValueError in training if N is not divisible by num_splits.
    """

    def __init__(
        self, num_features: int, num_splits: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.num_splits = num_splits

    def forward(self, x: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        if is_traced(x):
            return whole_call(self, x, relu, residual)
        # A layer of one split may have lost its statistics or momentum after `fuse_batch_norms`.
        if not self.training or (self.num_splits == 1 and not _splits(self)):
            y = super().forward(x)
            if residual is not None:
                y = y + residual
            return y.relu_() if relu else y
        self._check_input_dim(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        y = ghost_batch_norm(
            _as_maps(x),
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_splits,
            self.momentum,
            self.eps,
            relu,
            None if residual is None else _as_maps(residual),
        )
        self.num_batches_tracked.add_(1)
        return y if x.dim() == 4 else y.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


def memory_format(splits: int, device: torch.device) -> torch.memory_format:
    """Returns the order in memory of weights and maps that trains a model fastest.

    That is channels-last, but for split BatchNorm on a CPU without a kernel: where channels come
    first, PyTorch's BatchNorm takes the splits as more channels without a copy
    (`ops.batch_norm_pytorch`).

    splits: the most splits of a rank. DDP asks for one order on all ranks, and ranks may have
        different numbers of splits.
    """
    if device.type == "cpu" and splits > 1 and not normalises(torch.float32):
        return torch.contiguous_format
    return torch.channels_last


class SplitBatchNorm1d(SplitBatchNorm, nn.BatchNorm1d):
    """SplitBatchNorm of vectors (N, C) or sequences (N, C, L)."""


class SplitBatchNorm2d(SplitBatchNorm, nn.BatchNorm2d):
    """SplitBatchNorm of images (N, C, H, W)."""


class SplitBatchNorm3d(SplitBatchNorm, nn.BatchNorm3d):
    """SplitBatchNorm of videos or volumes (N, C, D, H, W)."""


_SPLIT: dict[type[nn.Module], type[SplitBatchNorm]] = {
    nn.BatchNorm1d: SplitBatchNorm1d,
    nn.BatchNorm2d: SplitBatchNorm2d,
    nn.BatchNorm3d: SplitBatchNorm3d,
}


def _as_maps(x: Tensor) -> Tensor:
    """Returns x as (N, C, H, W), without a copy if memory is contiguous or channels-last."""
    if x.dim() == 5:
        return x.flatten(2, 3)
    return x[(...,) + (None,) * (4 - x.dim())]


def split_batch_norm(module: nn.Module, num_splits: int) -> None:
    """Makes every BatchNorm (1d, 2d, 3d) inside `module` a SplitBatchNorm, in place.

    Keeps weights, statistics, modes, hooks and state-dict names. Torchvision's residual blocks then
    compute additions and ReLUs inside BatchNorm, see `fuse_blocks`.

    Raises ValueError for a BatchNorm without weights, running statistics or a fixed momentum.
    After an error nothing is changed.
    """
    norms: list[Any] = [part for part in module.modules() if type(part) in _SPLIT]
    for norm in norms:
        if not _splits(norm):
            raise ValueError(
                "bn_splits: expected BatchNorm with weights, running statistics and a momentum; "
                f"got {norm}"
            )
    _split(norms, num_splits)
    if norms:
        fuse_blocks(module)


def fuse_batch_norms(module: nn.Module) -> None:
    """Makes every BatchNorm2d inside `module` a SplitBatchNorm2d of one split, in place.

    Weights, statistics, modes, hooks and state-dict names stay. Additions and ReLUs of
    torchvision's residual blocks are computed inside BatchNorm. A BatchNorm without weights,
    running statistics or a fixed momentum stays as it is.
    """
    _split([p for p in module.modules() if type(p) is nn.BatchNorm2d and _splits(p)], 1)
    fuse_blocks(module)


def _splits(norm: _BatchNorm) -> bool:
    """Says whether a SplitBatchNorm can take the place of a BatchNorm."""
    if not norm.track_running_stats or norm.momentum is None:
        return False
    # (Every forward pass asks. Attributes of a module take several times as long.)
    tensors = (*norm._parameters.values(), *norm._buffers.values())
    return all(tensor is not None for tensor in tensors)


def _split(norms: Iterable[Any], num_splits: int) -> None:
    for norm in norms:
        norm.__class__ = _SPLIT[type(norm)]
        norm.num_splits = num_splits


class _FusedBlock(nn.Module):
    """The class of a fused residual block."""

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    bn1: SplitBatchNorm2d
    bn2: SplitBatchNorm2d
    downsample: nn.Module | None

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


class FusedBasicBlock(_FusedBlock):
    """A block of two convolutions, with additions and ReLUs computed by SplitBatchNorm2d.

    torchvision's BasicBlock, or TinyBlock.
    """

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        y = self.conv2(self.bn1(self.conv1(x), relu=True))
        # Under autocast x may be float32, and the convolution's result is not.
        return self.bn2(y, relu=True, residual=shortcut.to(y.dtype))


class FusedBottleneck(_FusedBlock):
    """torchvision's Bottleneck, with the addition and the ReLUs computed by SplitBatchNorm2d."""

    conv3: nn.Conv2d
    bn3: SplitBatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        y = self.bn1(self.conv1(x), relu=True)
        y = self.conv3(self.bn2(self.conv2(y), relu=True))
        return self.bn3(y, relu=True, residual=shortcut.to(y.dtype))


def fuse_blocks(module: nn.Module) -> None:
    """Makes residual blocks of torchvision and TinyResNet in `module` fused ones, in place.

    Only blocks whose BatchNorms are all SplitBatchNorm2d and whose activation is ReLU, without
    hooks or functions of their own on ReLU and BatchNorms. Children, hooks, modes and state-dict
    names stay. Register no hooks afterwards: a hook on the ReLU does not run, a hook on a BatchNorm
    sees addition and ReLU.
    """
    fused: dict[type[nn.Module], type[_FusedBlock]] = {TinyBlock: FusedBasicBlock}
    resnet = sys.modules.get("torchvision.models.resnet")
    if resnet is not None:  # no module has such blocks otherwise, and the import is slow
        fused |= {resnet.BasicBlock: FusedBasicBlock, resnet.Bottleneck: FusedBottleneck}
    for block in list(module.modules()):
        if type(block) not in fused:
            continue
        norms = [norm for name, norm in block.named_children() if name.startswith("bn")]
        if (
            all(isinstance(norm, SplitBatchNorm2d) for norm in norms)
            and type(block.relu) is nn.ReLU
            and not any(map(_is_changed, (block.relu, *norms)))
        ):
            block.__class__ = fused[type(block)]


def _is_changed(part: nn.Module) -> bool:
    """Says whether a layer has hooks, or a function in the place of `forward`."""
    return "forward" in vars(part) or any(
        (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        )
    )


def replace_batch_norms(
    module: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[Any], _BatchNorm]
) -> bool:
    """Replaces BatchNorms inside `module` in place. Returns whether any was replaced.

    wanted: tells whether a child is to be replaced.
    make: returns the new layer, which then takes the child's mode, weights and statistics.
        If it raises, nothing is changed.
    """
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
