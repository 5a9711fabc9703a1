"""ResNet-18 of a quarter of the width, for images of 32 pixels, which trains in minutes on a CPU.

He et al. 2016 (arXiv:1512.03385), table 1, with a stem for small images: 3x3, stride 2, no
max-pooling. `--model.arch mocofast.models.narrow:resnet18_quarter`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class _Quarter(ResNet):
    """Torchvision's ResNet with stages of 16, 32, 64 and 128 channels."""

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == 64:  # the first stage
            self.inplanes = 16
        return super()._make_layer(block, planes // 4, *args, **options)


def resnet18_quarter(num_classes: int) -> nn.Module:
    """Returns the encoder: (N, 3, S, S) to (N, num_classes), with 128 features before `.fc`."""
    encoder = _Quarter(BasicBlock, [2, 2, 2, 2])
    encoder.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.bn1 = nn.BatchNorm2d(16)
    encoder.maxpool = nn.Identity()
    encoder.fc = nn.Linear(128, num_classes)
    return encoder
