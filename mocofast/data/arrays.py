"""Images of any number of channels, of 8 or 16 bits: reads, scales, crops and resizes pixels.

The loaders use this module where an image is not 8-bit RGB. Files are .npy arrays, or images that
PIL reads with one to four channels.

Levels are integers: uint8 (0..255) or uint16 (0..65535). The largest level stands for the value 1.
A set has one type of levels: uint16 unless all images are arrays of uint8 in memory. Values of 8
bits become levels of 16 bits exactly, times 257.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from torch.nn import functional as F

from mocofast.data.decoding import image_size, open_image
from mocofast.errors import describe_error

NPY = ".npy"
_MAGIC = b"\x93NUMPY"
# PIL's modes by the number of channels.
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class PixelFormat(NamedTuple):
    """The pixels of a set of images, where the images are not 8-bit RGB."""

    channels: int
    dtype: np.dtype  # of the levels: uint8 or uint16

    def load(self, item: str | bytes | np.ndarray) -> np.ndarray:
        """Returns levels (H, W, channels).

        item: the path of a file, the content of a file, or an array.

        Raises ValueError for pixels that do not fit, and what numpy and PIL raise on a bad file.
        """
        pixels = item if isinstance(item, np.ndarray) else read_pixels(item, self.channels)
        return levels(channels_last(pixels, self.channels), self.dtype)

    def size(self, item: str | bytes | np.ndarray) -> tuple[int, int]:
        """Returns (height, width). Reads only the header of a file."""
        if isinstance(item, np.ndarray):
            shape: tuple[int, ...] = item.shape
        elif (found := _npy_shape(item)) is not None:
            shape = found
        else:
            return image_size(item)
        height, width, _ = _last(shape, self.channels)
        return height, width


def read_pixels(file: str | bytes, channels: int) -> np.ndarray:
    """Returns the pixels of a file, (H, W, C), (C, H, W) or (H, W), in the type of the file.

    file: a path or a content: an .npy array, or a format of PIL.
    channels: what PIL converts to. RGB becomes gray for 1, and gray becomes RGB for 3. Alpha is
        read for 2 and 4 alone.

    Raises ValueError where the file has fewer channels, and what numpy and PIL raise.
    """
    if _is_npy(file):
        # Pickled objects could run code.
        return np.load(io.BytesIO(file) if isinstance(file, bytes) else file, allow_pickle=False)
    with open_image(file) as image:
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            wide = np.asarray(image)
            # "I" has 32 bits, and holds 16 bits of a PGM.
            return wide.clip(0, 65535).astype(np.uint16) if image.mode[0] == "I" else wide
        found = len(image.getbands())
        if channels not in _MODES or (channels in (2, 4) and found != channels):
            raise ValueError(f"has {found} channels, not data.channels={channels}")
        return np.asarray(image.convert(_MODES[channels]))


def channels_last(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Returns pixels as (H, W, channels).

    pixels: (H, W, channels), (channels, H, W), or (H, W) for one channel.

    Raises ValueError for another shape.
    """
    height, width, _ = _last(pixels.shape, channels)
    if pixels.shape[-1] != channels and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    return pixels.reshape(height, width, channels)


def levels(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns pixels (H, W, C) as levels.

    pixels: uint8, uint16, or floats from 0 to 1. NaN becomes the mean of the channel.
    dtype: of the levels, uint8 or uint16.

    Raises ValueError for another type, and for floats outside 0 to 1.
    """
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.dtype.kind == "f":
        top = np.iinfo(dtype).max
        pixels = _without_nan(pixels.astype(np.float32))
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"floats must be from 0 to 1, found {low:.6g} to {high:.6g}")
        return np.rint(pixels * np.float32(top)).astype(dtype)
    if pixels.dtype == dtype:
        return pixels
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint16) * np.uint16(257)
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    raise ValueError(f"pixels must be uint8, uint16 or floats from 0 to 1, found {pixels.dtype}")


def unreadable(pixels: PixelFormat, files: Sequence[str | bytes | np.ndarray]) -> dict[int, str]:
    """Finds the files that `pixels` cannot load. Returns {position in `files`: reason}."""
    bad = {}
    for position, file in enumerate(files):
        try:
            pixels.load(file)
        except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
            bad[position] = describe_error(error)
    return bad


def as_tensor(image: np.ndarray) -> Tensor:
    """Returns an array as a tensor. Copies an array that cannot be written."""
    return torch.from_numpy(image if image.flags.writeable else image.copy())


def resized_crop(image: Tensor, top: int, left: int, height: int, width: int, size: int) -> Tensor:
    """Returns a crop of an image, resized to (size, size, C): antialiased and bilinear.

    image: (H, W, C), uint8 or uint16.
    """
    crop = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
    shape, dtype = (size, size), image.dtype
    if dtype == torch.uint8:
        resized = F.interpolate(crop, shape, mode="bilinear", antialias=True)
    else:
        resized = F.interpolate(crop.float(), shape, mode="bilinear", antialias=True)
        resized = resized.round_().clamp_(0, 65535).to(dtype)
    return resized[0].permute(1, 2, 0)


def central_view(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the central square, (size, size, C), as the ImageNet protocol cuts it.

    The square is 224/256 of the shorter side. If neither side of the image is larger than `size`,
    the square is the whole shorter side, because there is no margin to crop. The square is cut at
    whole pixels before the resize, so an image of any shape takes little time.
    """
    height, width = image.shape[:2]
    small = max(height, width) <= size
    side = min(height, width)
    side = side if small else max(1, round(side * size / round(size * 256 / 224)))
    box = (height - side) // 2, (width - side) // 2, side, side
    return resized_crop(as_tensor(image), *box, size).numpy()


def _is_npy(file: str | bytes) -> bool:
    if isinstance(file, bytes):
        return file.startswith(_MAGIC)
    with open(file, "rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC


def _npy_shape(file: str | bytes) -> tuple[int, ...] | None:
    """Returns the shape in the header of an .npy file, or None for a file of another kind."""
    if not _is_npy(file):
        return None
    with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
        version = npy.read_magic(opened)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape: tuple[int, ...] = read(opened)[0]
        return shape


def _last(shape: tuple[int, ...], channels: int) -> tuple[int, int, int]:
    """Returns (H, W, channels) of pixels. Raises ValueError if the shape does not fit."""
    if len(shape) == 2 and channels == 1:
        found = (*shape, 1)
    elif len(shape) == 3 and shape[2] == channels:
        found = shape
    elif len(shape) == 3 and shape[0] == channels:
        found = (*shape[1:], channels)
    else:
        raise ValueError(
            f"pixels must be (H, W, {channels}) or ({channels}, H, W) for "
            f"data.channels={channels}, found {shape}"
        )
    if 0 in found:
        raise ValueError(f"pixels must not be empty, found {shape}")
    return found


def _without_nan(pixels: np.ndarray) -> np.ndarray:
    """Returns floats (H, W, C), with the mean of the channel for NaN (0 where all are NaN)."""
    missing = np.isnan(pixels)
    if not missing.any():
        return pixels
    counts = (~missing).sum((0, 1)).clip(min=1)
    means = np.where(missing, 0, pixels).sum((0, 1), dtype=np.float64) / counts
    return np.where(missing, means.astype(np.float32), pixels)
