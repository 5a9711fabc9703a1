"""Pixels as encoders take them."""

from __future__ import annotations

import torch
from torch import Tensor

from mocofast.config import AugmentConfig


def pixel_statistics(augment: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Channel mean and standard deviation of uint8 pixels, each (3,) float32 on the 0..255 scale."""
    return 255 * torch.tensor(augment.mean), 255 * torch.tensor(augment.std)


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
    return (
        images.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else images
    )
