"""Encoders by name, their inputs, their features, and BatchNorm over parts of a batch."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mocofast.config import AugmentConfig, ConfigError
from mocofast.normalization import ghost_batch_norm, replace_batch_norms
from mocofast.vit import SIZES, vision_transformer

TORCHVISION = ("resnet*", "wide_resnet*", "resnext*", "vit_*")  # families whose models end in .fc or .heads
HEADS = ("fc", "head", "heads")


def build_encoder(arch: str, image_size: int = AugmentConfig.size) -> Callable[..., nn.Module]:
    """The constructor `f(num_classes=...)` of an encoder.

    arch: a torchvision ResNet, Wide ResNet, ResNeXt or ViT; one of the first three with `_cifar` appended, for
    small images: 3x3 stride-1 stem and no max-pooling (as MoCo's CIFAR demo); a ViT of `mocofast.vit.SIZES`; or
    `resnet_tiny`. image_size: side of the images, of which ViTs take this one only. ConfigError (a ValueError) for
    another name, or a size that is not made of patches.
    """
    from torchvision.models import get_model, list_models

    names = list_models(include=list(TORCHVISION))
    if arch in SIZES or (arch in names and arch.startswith("vit_")):
        patch = SIZES[arch].patch_size if arch in SIZES else int(arch.rpartition("_")[2])
        if image_size % patch:
            raise ConfigError(f"augment.size: expected a multiple of {patch}, {arch}'s patch: got {image_size}")
        make = vision_transformer if arch in SIZES else _torchvision_vit
        return functools.partial(make, arch, image_size)
    if arch in names:
        return functools.partial(get_model, arch)
    cifar = {f"{name}_cifar": name for name in names if not name.startswith("vit_")}
    if arch in cifar:
        return functools.partial(_cifar_resnet, cifar[arch])
    if arch == "resnet_tiny":
        return TinyResNet
    nearest = difflib.get_close_matches(arch, [*names, *cifar, *SIZES, "resnet_tiny"], n=1, cutoff=0)[0]
    raise ConfigError(f"model.arch: unknown encoder {arch!r}; the nearest known one is {nearest!r}")


def _torchvision_vit(name: str, image_size: int, num_classes: int) -> nn.Module:
    from torchvision.models import get_model

    encoder = get_model(name, image_size=image_size, num_classes=num_classes)
    encoder.heads.head.reset_parameters()  # torchvision's zeros are for a classifier: no embedding is of length 0
    return encoder


def _cifar_resnet(name: str, num_classes: int) -> nn.Module:
    from torchvision.models import get_model

    encoder = get_model(name, num_classes=num_classes)
    encoder.conv1 = nn.Conv2d(3, encoder.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    encoder.maxpool = nn.Identity()
    return encoder


class TinyResNet(nn.Module):
    """A ResNet for images of about 8 pixels a side, quick on a CPU: three basic blocks, 64 features."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _BasicBlock(16, 16, stride=1)
        self.layer2 = _BasicBlock(16, 32, stride=2)
        self.layer3 = _BasicBlock(32, 64, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 16, S, S)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, S/4, S/4)
        return self.fc(x.mean((2, 3)))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def head_name(encoder: nn.Module) -> str:
    """Under which of `fc`, `head`, `heads` the encoder keeps its last layers; ValueError where there is none."""
    for name in HEADS:
        if isinstance(getattr(encoder, name, None), nn.Module):
            return name
    raise ValueError(f"encoder: expected a module ending in {', '.join(HEADS)}; {type(encoder).__name__} has none")


def add_mlp_head(encoder: nn.Module) -> None:
    """Replaces the last linear layer by Linear(d, d)-ReLU-that layer, the head of MoCo v2 (arXiv:2003.04297)."""
    head = head_name(encoder)
    linears = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in linears if name == head or name.startswith(f"{head}.")]
    if not inside:
        raise ValueError(f"mlp: expected a linear layer in the encoder's .{head}, and there is none")
    parent_name, _, name = inside[-1].rpartition(".")
    parent = encoder.get_submodule(parent_name)
    last: nn.Linear = getattr(parent, name)
    width = last.in_features
    setattr(parent, name, nn.Sequential(nn.Linear(width, width), nn.ReLU(), last))


def features(encoder: nn.Module, images: Tensor) -> Tensor:
    """The pooled features of images (N, 3, S, S) before the encoder's head, (N, D): the input of its .fc or .head."""
    found: list[Tensor] = []
    head = encoder.get_submodule(head_name(encoder))
    handle = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        encoder(images)
    finally:
        handle.remove()
    return found[0]


def prepare_images(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels as an encoder takes them: (N, 3, S, S) uint8 -> (x - mean) / std, channels-last.

    mean, std: three channels' statistics on the 0..255 scale, on the images' device. The result has the autocast
    dtype where autocast is on, else float32; the arithmetic is float32 either way.
    """
    pixels = images.contiguous(memory_format=torch.channels_last)
    # uint8 - float32 converts while it subtracts: one pass over the pixels less.
    normalised = (pixels - mean.float().view(3, 1, 1)).div_(std.float().view(3, 1, 1))
    return to_autocast_dtype(normalised)


def to_autocast_dtype(images: Tensor) -> Tensor:
    """The images in the type that autocast would give them at the first convolution; as they are without autocast."""
    device = images.device.type
    return images.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else images


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that takes its statistics over parts of the batch, as if each part were on a GPU of its own.

    In training, sample n belongs to part n % num_splits, as in MoCo's CIFAR demo; running statistics become the mean
    over the parts of what each part would have made them. In eval mode it is an ordinary BatchNorm2d, and its
    state-dict names are BatchNorm2d's. The batch has to be divisible by num_splits in training (ValueError).
    `residual`, of the input's shape and type, is added to what BatchNorm gives, and `relu` rectifies the sum: on CUDA
    in one pass.
    """

    def __init__(self, num_features: int, num_splits: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
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
        from mocofast.fused_blocks import fuse_blocks

        fuse_blocks(module, SplitBatchNorm2d)
