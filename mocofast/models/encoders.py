"""Builds encoders by name, and gives access to their heads and features."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mocofast.config import AugmentConfig, Config, ConfigError
from mocofast.models.heads import head_name as head_name
from mocofast.models.heads import head_names, pooled, put
from mocofast.models.heads import replace_head as replace_head
from mocofast.models.libraries import (
    PRETRAINED,
    TIMM,
    checked_outputs,
    function_encoder,
    timm_encoder,
)
from mocofast.models.vit import (
    SIZES,
    conv_of,
    use_packed_attention,
    vision_transformer,
    with_residual_options,
)
from mocofast.plugins import is_plugin, load_plugin
from mocofast.view_sizes import Size, height_width, pixels_text

# Families of torchvision whose models end in .fc or .heads.
TORCHVISION = ("resnet*", "wide_resnet*", "resnext*", "vit_*")
SOLO = "_solo_cifar"  # suffix of ResNets with solo-learn's stem for small images


def configured_encoder(config: Config) -> Callable[..., nn.Module]:
    """Returns `build_encoder` with the options of a configuration."""
    m = config.model
    return build_encoder(
        m.arch,
        config.augment.size,
        config.data.channels,
        drop_path=m.drop_path,
        layer_scale=m.layer_scale,
    )


def untrained(config: Config) -> Config:
    """Returns a configuration that builds encoders without timm's weights.

    For a model whose weights follow, from a checkpoint: timm's weights may not be on this disk.
    """
    arch = config.model.arch
    if arch.startswith(TIMM):  # a function of the user may be called pretrained
        arch = arch.removesuffix(PRETRAINED)
    return replace(config, model=replace(config.model, arch=arch))


def build_encoder(
    arch: str,
    image_size: Size = AugmentConfig.size,
    channels: int = 3,
    *,
    drop_path: float = 0.0,
    layer_scale: float = 0.0,
) -> Callable[..., nn.Module]:
    """Returns the constructor `f(num_classes=...)` of an encoder.

    arch: a torchvision ResNet, Wide ResNet, ResNeXt or ViT, a ViT of `mocofast.models.vit.SIZES`,
        or `resnet_tiny`. The suffix `_cifar` of a ResNet, Wide ResNet or ResNeXt is for small
        images: 3x3 stride-1 stem and no max-pooling, as in MoCo's CIFAR demo. With `_solo_cifar`
        the stem pads two pixels, as solo-learn's does. The dotted name of a module of yours: the
        module's `build_encoder(image_size)` returns the constructor. For other numbers of channels
        than 3, it is `build_encoder(image_size, channels=...)`.
        "timm/NAME": a model of timm. "package.module:function": a function of yours, called with
        num_classes, image_size and channels where it names these arguments.
    image_size: side of the images in pixels, or (height, width). A ViT is made for images of this
        size, and takes images of other sizes, which are made of whole patches, too.
    channels: of the images. The first convolution is made for other numbers than 3, initialised as
        the library does.
    drop_path, layer_scale: options of ViTs and of models of timm, see `ModelConfig`.
    Raises ConfigError (a ValueError) for an unknown name (naming the nearest known name), and for
    an image size that is not a multiple of the patch size.
    """
    if arch.startswith(TIMM):
        build = timm_encoder(arch.removeprefix(TIMM), image_size, channels, drop_path, layer_scale)
        return checked_outputs(arch, build, image_size, channels)
    if (drop_path or layer_scale) and not arch.startswith("vit_"):
        raise ConfigError(
            f"model.{'drop_path' if drop_path else 'layer_scale'}: expected 0 for model.arch "
            f"{arch}; ViTs (vit_*) and models of timm take other values"
        )
    if ":" in arch:
        build = function_encoder(arch, image_size, channels)
        return checked_outputs(arch, build, image_size, channels)
    if is_plugin(arch):
        return _plugin_encoder(arch, image_size, channels)
    if arch == "resnet_tiny":  # needs no torchvision, which takes a second to import
        return TinyResNet if channels == 3 else functools.partial(TinyResNet, channels=channels)
    from torchvision.models import list_models

    names = list_models(include=list(TORCHVISION))
    if arch in SIZES or (arch in names and arch.startswith("vit_")):
        patch = SIZES[arch].patch_size if arch in SIZES else int(arch.rpartition("_")[2])
        if any(side % patch for side in height_width(image_size)):
            raise ConfigError(
                f"augment.size: expected a multiple of {patch}, {arch}'s patch: got "
                f"{pixels_text(image_size)}"
            )
        make = vision_transformer if arch in SIZES else _torchvision_vit
        plain = functools.partial(make, arch, image_size, channels=channels)
        if not drop_path and not layer_scale:
            return plain
        return lambda num_classes: with_residual_options(
            plain(num_classes=num_classes), drop_path, layer_scale
        )
    if arch in names:
        return functools.partial(_torchvision_resnet, arch, channels=channels)
    cifar = {f"{name}_cifar": name for name in names if not name.startswith("vit_")}
    if (small := arch.replace(SOLO, "_cifar")) in cifar:
        padding = 2 if arch.endswith(SOLO) else 1
        return functools.partial(_cifar_resnet, cifar[small], channels=channels, padding=padding)
    nearest = difflib.get_close_matches(
        arch, [*names, *cifar, *SIZES, "resnet_tiny"], n=1, cutoff=0
    )[0]
    raise ConfigError(f"model.arch: unknown encoder {arch!r}; the nearest known one is {nearest!r}")


def _plugin_encoder(name: str, image_size: Size, channels: int) -> Callable[..., nn.Module]:
    build = load_plugin("model.arch", name, "build_encoder").build_encoder
    constructor: Callable[..., nn.Module]
    if channels == 3:
        constructor = build(image_size)
    elif "channels" in inspect.signature(build).parameters:
        constructor = build(image_size, channels=channels)
    else:
        raise ConfigError(
            f"data.channels: {channels} channels need an argument `channels` of `build_encoder` in "
            f"model.arch {name!r}: build_encoder(image_size, channels=3)"
        )
    return constructor


def _torchvision_resnet(name: str, num_classes: int, channels: int) -> nn.Module:
    from torchvision.models import get_model

    encoder = get_model(name, num_classes=num_classes)
    if channels != 3:
        encoder.conv1 = conv_of(encoder.conv1, channels)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    return encoder


def _torchvision_vit(name: str, image_size: Size, num_classes: int, channels: int) -> nn.Module:
    from torchvision.models import get_model

    from mocofast.models.flexible_vit import FlexibleViT

    side = max(height_width(image_size))
    encoder = get_model(name, image_size=side, num_classes=num_classes)
    if channels != 3:
        encoder.conv_proj = conv_of(encoder.conv_proj, channels)
        fan_in = encoder.conv_proj.weight[0].numel()
        nn.init.trunc_normal_(encoder.conv_proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(encoder.conv_proj.bias)
    encoder.__class__ = FlexibleViT  # torchvision's function builds no other class
    encoder.set_image_size(image_size)
    # torchvision's zeros are for classifiers. Here all embeddings would be zero.
    encoder.heads.head.reset_parameters()
    use_packed_attention(encoder)
    return encoder


def _cifar_resnet(name: str, num_classes: int, channels: int, padding: int) -> nn.Module:
    from torchvision.models import get_model

    encoder = get_model(name, num_classes=num_classes)
    width = encoder.conv1.out_channels
    encoder.conv1 = nn.Conv2d(channels, width, kernel_size=3, padding=padding, bias=False)
    encoder.maxpool = nn.Identity()
    return encoder


class TinyResNet(nn.Module):
    """A ResNet for images of about 8 x 8 pixels, fast on a CPU: three basic blocks, 64 features."""

    def __init__(self, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = TinyBlock(16, 16, stride=1)
        self.layer2 = TinyBlock(16, 32, stride=2)
        self.layer3 = TinyBlock(32, 64, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 16, S, S)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, S/4, S/4)
        return self.fc(x.mean((2, 3)))


class TinyBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016, arXiv:1512.03385)."""

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
                nn.Conv2d(channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def add_mlp_head(encoder: nn.Module) -> None:
    """Puts Linear(d, d) and ReLU before the last linear layer: MoCo v2's head (arXiv:2003.04297).

    Raises ValueError if the head has no linear layer.
    """
    for head in head_names(encoder):
        linears = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Linear)}
        inside = [name for name in linears if name == head or name.startswith(f"{head}.")]
        if not inside:
            raise ValueError(
                f"mlp: expected a linear layer in the encoder's .{head}, and there is none"
            )
        last = linears[inside[-1]]
        width = last.in_features
        put(encoder, inside[-1], nn.Sequential(nn.Linear(width, width), nn.ReLU(), last))


def features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Returns features (N, D) of images (N, C, S, S): the inputs of the encoder's head, pooled.

    With several heads (models of timm), the mean of all inputs (distilled models), or all inputs
    in a row where widths differ (CrossViT). Auxiliary heads, VOLO's for patches, do not count.
    """
    names = head_names(encoder)
    given = zip(names, head_inputs(encoder, images), strict=True)
    inputs = [x for name, x in given if name == names[0] or not name.startswith("aux_")]
    widths = {x.shape[1] for x in inputs}
    if len(widths) > 1:
        return torch.cat(inputs, dim=1)
    return inputs[0] if len(inputs) == 1 else torch.stack(inputs).mean(0)


def head_inputs(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns the pooled inputs (N, D) of every head of `head_names`, of images (N, C, S, S)."""
    found: dict[int, Tensor] = {}
    heads = [encoder.get_submodule(name) for name in head_names(encoder)]
    handles = [
        head.register_forward_pre_hook(lambda _, given, i=i: found.update({i: given[0]}))
        for i, head in enumerate(heads)
    ]
    try:
        encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    return [pooled(found[i], isinstance(head, nn.Linear)) for i, head in enumerate(heads)]
