"""Images of any number of channels, of 8 or 16 bits: reads, scales, crops and resizes pixels.

The loaders use this module where an image is not 8-bit RGB. Files are all files that
`mocofast.data.decoding` reads.

Levels are integers: uint8 (0..255) or uint16 (0..65535). The largest level stands for the value 1.
A set has one type of levels: uint16 unless all images are arrays of uint8 in memory. Values of 8
bits become levels of 16 bits exactly, times 257.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mocofast.data.decoding import (
    File,
    Given,
    kind_of,
    open_image,
    pixels_of,
    read_header,
    wide_color,
)
from mocofast.data.items import Item
from mocofast.data.names import checked_labels, digest
from mocofast.data.numpy_files import channels_last, sizes
from mocofast.data.ranges import AUTO, MISSING, Pixels, ValueRange, missing_values, to_levels
from mocofast.data.resize import resized_crop
from mocofast.view_sizes import Size, height_width

# PIL's modes with transparency, by the number of channels.
_WITH_ALPHA = {2: "LA", 4: "RGBA"}


class PixelFormat(NamedTuple):
    """How the pixels of a set are read, where the images are not 8-bit RGB."""

    channels: int
    dtype: np.dtype  # of the levels: uint8 or uint16
    value_range: ValueRange = AUTO  # the numbers of files that mean the lowest and highest level

    def load(self, item: Given) -> np.ndarray:
        """Returns levels (H, W, channels).

        item: a file, or an array of levels.

        Raises ValueError for pixels that do not fit, and what numpy and PIL raise on a bad file.
        """
        if isinstance(item, np.ndarray):
            return channels_last(item, self.channels)
        return to_levels(read_numbers(item, self.channels), self.value_range, self.dtype)

    def size(self, item: Given) -> tuple[int, int]:
        """Returns (height, width). Reads only the header of a file, where the format has one."""
        if isinstance(item, np.ndarray):
            return sizes(item.shape, self.channels)[:2]
        return read_header(item, self.channels)[:2]


def read_numbers(file: File, channels: int) -> Pixels:
    """Returns the numbers of a file, (H, W, channels).

    file: any file of `decoding.read_pixels`.
    channels: RGB becomes gray for 1, and gray becomes RGB for 3. Transparency is read for 2 and
        4 channels alone.

    Raises ValueError where the file has another number of channels, and what numpy,
    `decoding.read_pixels` and PIL raise.
    """
    kind = kind_of(file)
    if isinstance(kind, Item):
        pixels = kind.pixels(channels)
    else:
        assert not isinstance(file, Item)
        photo_with_alpha = kind is None and channels in _WITH_ALPHA
        if photo_with_alpha and (with_alpha := _with_alpha(file, channels)) is not None:
            return with_alpha
        pixels = pixels_of(file, kind, channels)
    values = pixels.values
    if channels == 1 and values.shape[2] == 3:
        values = _gray(pixels)
    elif channels == 3 and values.shape[2] == 1:
        values = values.repeat(3, axis=2)
    if values.shape[2] != channels:
        raise ValueError(f"has {values.shape[2]} channels, not data.channels={channels}")
    return pixels._replace(values=values)


def _gray(pixels: Pixels) -> np.ndarray:
    """Returns the gray of colours (ITU-R BT.601, as PIL), (H, W, 1) of the same type.

    Missing values, also of one colour, stay missing.
    """
    values = pixels.values
    missing = missing_values(pixels)
    if values.dtype == np.uint8 and missing is None:
        return np.asarray(Image.fromarray(values).convert("L"))[..., None]
    gray = values.astype(np.float64) @ (0.299, 0.587, 0.114)
    if values.dtype.kind != "f":
        gray = np.rint(gray)
    if missing is not None:
        mark = np.nan if values.dtype.kind == "f" else pixels.nodata
        gray[missing.any(axis=2)] = MISSING[0] if mark is None else mark
    return gray.astype(values.dtype)[..., None]


def _with_alpha(file: str | bytes, channels: int) -> Pixels | None:
    """Returns colours and transparency of a photo, or None where it has other channels."""
    with open_image(file) as image:
        # PIL cuts more bits off.
        if image.mode != _WITH_ALPHA[channels] or image.format == "JPEG2000" or wide_color(image):
            return None
        return Pixels(np.asarray(image), 0.0, 255.0)


def float_levels(pixels: np.ndarray) -> np.ndarray:
    """Returns floats from 0 to 1, (H, W, C), as levels of uint16.

    NaN becomes the mean of the channel. Raises ValueError for floats outside 0 to 1.
    """
    low, high = np.nanmin(pixels), np.nanmax(pixels)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"floats must be from 0 to 1, found {low:.6g} to {high:.6g}")
    return to_levels(Pixels(pixels, 0.0, 1.0), ValueRange("dtype"), np.dtype(np.uint16))


class ArraySource:
    """Images in memory. `load` returns pixels (H, W, C), uint8 or uint16."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        classes: tuple[str, ...],
        prefix: str = "image",
    ) -> None:
        """Raises ValueError for images or labels of a wrong shape or type.

        images: (N, H, W, C), uint8, uint16, or floats from 0 to 1, which become uint16.
        labels: (N,) integers that index `classes`, or None.
        prefix: the start of every image's name.
        """
        known = images.dtype in (np.uint8, np.uint16) or images.dtype.kind == "f"
        if images.ndim != 4 or not known:
            raise ValueError(
                "images must be (N, H, W, C) uint8, uint16, or floats from 0 to 1, "
                f"got {images.shape} {images.dtype}"
            )
        if images.dtype.kind == "f":
            scaled = np.empty(images.shape, np.uint16)
            for index, image in enumerate(images):
                scaled[index] = float_levels(image)
            images = scaled
        self.images = images
        self.labels = checked_labels(labels, len(images), classes)
        self.classes = classes
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Returns the prefix and the index."""
        return f"{self.prefix} {index}"

    def load(self, index: int) -> np.ndarray:
        """Returns the pixels of an image."""
        return self.images[index]

    def fingerprint(self) -> str:
        """Returns a hash of pixels and labels."""
        depth = "" if self.images.dtype == np.uint8 else str(self.images.dtype)
        shape = repr(self.images.shape).encode() + depth.encode()
        return digest(
            shape + np.ascontiguousarray(self.images).tobytes(), self.labels, self.classes
        )


def as_tensor(image: np.ndarray) -> Tensor:
    """Returns an array as a tensor. Copies an array that cannot be written."""
    return torch.from_numpy(image if image.flags.writeable else image.copy())


def central_view(image: np.ndarray, size: Size) -> np.ndarray:
    """Returns the central crop, (height, width, C) of `size`, as the ImageNet protocol cuts it.

    The crop has the shape of the view. It is 224/256 of the largest such crop, or the largest
    itself if no side of the image is larger than the view, because there is no margin to crop. It
    is cut at whole pixels before the resize, so an image of any shape takes little time.
    """
    full, shape = (image.shape[0], image.shape[1]), height_width(size)
    short = shorter_axis(full, shape)
    small = all(side <= wanted for side, wanted in zip(full, shape))
    side = full[short]
    if not small:
        side = max(1, round(side * shape[short] / round(shape[short] * 256 / 224)))
    other = min(full[1 - short], max(1, round(side * shape[1 - short] / shape[short])))
    height, width = (side, other) if short == 0 else (other, side)
    box = (full[0] - height) // 2, (full[1] - width) // 2, height, width
    return resized_crop(as_tensor(image), box, shape).numpy()


def shorter_axis(full: tuple[int, int], shape: tuple[int, int]) -> int:
    """Returns the axis along which an image has fewer pixels for a pixel of the view: 0 or 1.

    full, shape: (height, width) of the image and of the view.
    """
    return 0 if full[0] * shape[1] <= full[1] * shape[0] else 1
