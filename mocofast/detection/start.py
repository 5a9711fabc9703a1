"""The weights at the start of a run: none, ImageNet's, or the encoder of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mocofast.config import AugmentConfig, ConfigError
from mocofast.detection.options import STARTS, StartOptions
from mocofast.interop.reading import read_any, tensors_of
from mocofast.interop.reference_checkpoints import load_any, load_backbone
from mocofast.interop.weights import backbone_state_dict
from mocofast.models.encoders import build_encoder
from mocofast.settings import nearest


class Start(NamedTuple):
    """The encoder and the images of a start.

    weights: of the encoder without head, under the names of the encoder. None: random.
    """

    weights: dict[str, Tensor] | None
    arch: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def find_start(options: StartOptions) -> Start:
    """Reads the weights of `options.init`. The options say what the file leaves open.

    Raises FileNotFoundError, and ConfigError for a file without a known encoder, and for an
    encoder or images that differ from the options.
    """
    init = options.init
    arch, channels = options.arch or "resnet50", options.channels or 3
    mean, std = options.mean or AugmentConfig.mean, options.std or AugmentConfig.std
    if init == "scratch":
        return Start(None, arch, channels, mean, std)
    if init == "imagenet":
        if channels != 3:
            raise ConfigError(f"model.channels: ImageNet's weights take 3 channels, got {channels}")
        return Start(_imagenet(arch), arch, 3, mean, std)
    if not Path(init).exists():
        raise FileNotFoundError(
            f"CKPT: expected scratch, imagenet, a run folder or a checkpoint, got {init!r}"
            f"{nearest(init, STARTS)}"
        )
    loaded = load_any(init, options.arch or None)
    config = loaded.config
    if options.channels not in (0, config.data.channels):
        raise ConfigError(
            f"model.channels: {options.channels}, and the encoder of {init} takes "
            f"{config.data.channels}"
        )
    return Start(
        backbone_state_dict(loaded.method),
        config.model.arch,
        config.data.channels,
        options.mean or config.augment.mean,
        options.std or config.augment.std,
    )


def _imagenet(arch: str) -> dict[str, Tensor]:
    """Returns torchvision's weights of ImageNet, from the folder where PyTorch keeps downloads."""
    from torchvision.models import get_model_weights

    try:
        known = [str(w.url).rpartition("/")[2] for w in get_model_weights(arch)]
    except ValueError:
        raise ConfigError(
            f"imagenet: torchvision has no weights of {arch}; name a file as CKPT instead"
        ) from None
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    found = next((folder / name for name in known if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(
            f"imagenet: expected {' or '.join(known)} in {folder}, which nothing downloads here; "
            "copy a file there (TORCH_HOME moves the folder), or name a file as CKPT"
        )
    return tensors_of(read_any(found)[0])


def encoder_of(start: Start) -> nn.Module:
    """Returns the encoder with the weights. Raises ConfigError where the weights do not fit."""
    if start.channels not in (1, 3):
        raise ConfigError(
            f"model.channels: detection reads images of 1 or 3 channels, got {start.channels}"
        )
    for name, values in (("mean", start.mean), ("std", start.std)):
        if len(values) not in (1, start.channels):
            raise ConfigError(
                f"model.{name}: expected {start.channels} values or 1 value, got {len(values)}"
            )
    encoder = build_encoder(start.arch, channels=start.channels)(num_classes=1)
    if not hasattr(encoder, "layer1"):
        raise ConfigError(
            f"model.arch: detection needs a ResNet (stages layer1, layer2, ...), got {start.arch}"
        )
    if start.weights is not None:
        load_backbone(encoder, start.weights, start.arch)
    return encoder
