"""Converts pixels to the inputs of encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from mocofast.config import AugmentConfig

# Types of pixels. The largest level of uint16 stands for the same value as 255.
LEVELS = (torch.uint8, torch.uint16)


def pixel_statistics(augment: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of pixels on the 0..255 scale.

    Both are float32, (C,) or (1,) for all channels.
    """
    return 255 * torch.tensor(augment.mean), 255 * torch.tensor(augment.std)


def prepare_images(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Returns (images - mean) / std: in the autocast dtype, or else in float32.

    The arithmetic is in float32.

    images: (N, C, S, S), uint8 or uint16.
    mean, std: C values or one value, on the 0..255 scale, on the device of the images.
    memory_format: of the result.
    """
    pixels = images.contiguous(memory_format=memory_format)
    mean, std = mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)
    if images.dtype == torch.uint16:
        pixels, mean, std = pixels.float(), 257 * mean, 257 * std
    # uint8 - float32 converts and subtracts in the same pass over the pixels.
    return to_autocast_dtype((pixels - mean).div_(std))


def to_autocast_dtype(images: Tensor) -> Tensor:
    """Returns images in the autocast dtype, as the first convolution would, if autocast is on."""
    device = images.device.type
    return (
        images.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else images
    )
