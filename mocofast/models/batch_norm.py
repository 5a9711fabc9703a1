"""Torchvision's residual blocks with BatchNorm, residual and ReLU in one call where that is a SplitBatchNorm2d."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck


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


FUSED: dict[type[nn.Module], type[nn.Module]] = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}


def fuse_blocks(module: nn.Module, norm: type[nn.Module]) -> None:
    """Turns torchvision's blocks inside `module` into those above, in place, where their BatchNorms are all `norm`.

    Hooks on the ReLU inside a block no longer run.
    """
    for block in module.modules():
        fused = FUSED.get(type(block))
        norms = [child for name, child in block.named_children() if name.startswith("bn")]
        if fused is not None and all(isinstance(child, norm) for child in norms):
            block.__class__ = fused
