"""Converts uint8 pixels to the inputs of encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from mocofast.config import AugmentConfig


def pixel_statistics(augment: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of uint8 pixels: (3,) and (3,) float32, 0..255 scale."""
    return 255 * torch.tensor(augment.mean), 255 * torch.tensor(augment.std)


def prepare_images(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns (images - mean) / std, channels-last: in the autocast dtype, or else in float32.

    The arithmetic is in float32.

    images: (N, 3, S, S) uint8.
    mean, std: (3,), on the 0..255 scale, on the device of the images.
    """
    pixels = images.contiguous(memory_format=torch.channels_last)
    # uint8 - float32 converts and subtracts in the same pass over the pixels.
    normalised = (pixels - mean.float().view(3, 1, 1)).div_(std.float().view(3, 1, 1))
    return to_autocast_dtype(normalised)


def to_autocast_dtype(images: Tensor) -> Tensor:
    """Returns images in the autocast dtype, as the first convolution would, if autocast is on."""
    device = images.device.type
    return (
        images.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else images
    )
