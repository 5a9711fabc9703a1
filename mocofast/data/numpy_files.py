"""Files of numpy: .npy arrays, and the first image of .npz archives.

An array is (H, W, C), (C, H, W), or (H, W) for one channel.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.lib import format as npy

from mocofast.data.items import ALL, WHOLE, Extent, check_pixels, first_channels, native, opened
from mocofast.data.ranges import Pixels, type_bounds

NPY = ".npy"
MAGIC = b"\x93NUMPY"
MOST_CHANNELS = 16  # of an array whose sides are not `wanted`: a longer side holds pixels or slices
# Names of the image in an .npz archive with several arrays. Otherwise the first array of two or
# more dimensions is read.
IMAGE_NAMES = ("image", "img", "x", "data", "arr_0")


def extent(file: str | bytes, wanted: int, part: int = WHOLE) -> Extent:
    """Returns the size of an array. Arguments: as `items.FileReader`."""
    with _member(file) as (member, remark):
        shape, dtype = array_header(member)
    height, width, channels = sizes(shape, _channels(shape, wanted))
    check_pixels(height, width)
    words = ", ".join(filter(None, (remark, _first(channels, wanted)[1])))
    return Extent(height, width, dtype != np.uint8, words, "NPY")


def pixels(file: str | bytes, wanted: int, part: int = WHOLE) -> Pixels:
    """Returns the numbers of an array. Arguments: as `items.FileReader`."""
    with _member(file) as (member, _):
        shape, _ = array_header(member)
        check_pixels(*sizes(shape, _channels(shape, wanted))[:2])  # a packed array may be a bomb
        member.seek(0)
        # Pickled objects could run code.
        values = native(npy.read_array(member, allow_pickle=False))
    values = channels_last(values, _channels(values.shape, wanted))
    values = values[..., : _first(values.shape[2], wanted)[0]]
    return Pixels(values, *type_bounds(values.dtype))


def count(file: str | bytes) -> int:
    """Returns 1."""
    return 1


def channels_last(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Returns pixels as (H, W, channels).

    pixels: (H, W, channels), (channels, H, W), or (H, W) for one channel.

    Raises ValueError for another shape.
    """
    height, width, _ = sizes(pixels.shape, channels)
    if pixels.shape[-1] != channels and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    return pixels.reshape(height, width, channels)


def sizes(shape: tuple[int, ...], channels: int) -> tuple[int, int, int]:
    """Returns (H, W, C) of pixels. Raises ValueError if the shape does not fit."""
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


def array_header(member: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and the type of an array from its header.

    Raises ValueError for an array of Python objects, which are pickled and could run code.
    """
    version = npy.read_magic(member)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("Object arrays are not read: they could run code")
    return shape, dtype


def read_arrays(place: Path) -> dict[str, np.ndarray]:
    """Reads an .npz file of arrays that are not compressed. Takes no more memory than the file."""
    arrays = {}
    with zipfile.ZipFile(place) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            with archive.open(info) as member:
                content = io.BytesIO(member.read())
            shape, dtype = array_header(content)
            if dtype.kind not in "iSU" or len(shape) > 1:
                raise ValueError(f"{info.filename} holds {dtype} {shape}")
            # An array of another size than its header states raises ValueError.
            values = np.frombuffer(content.read(), dtype) if dtype.itemsize else np.empty(0, dtype)
            arrays[info.filename.removesuffix(".npy")] = values.reshape(shape)
    return arrays


def _channels(shape: tuple[int, ...], wanted: int) -> int:
    """Returns the number of channels of an array: one channel is gray where RGB is wanted, too.

    The shorter of the first and the last side counts the channels where no side is `wanted`, and
    no more than MOST_CHANNELS, or where all channels are wanted.
    """
    if len(shape) < 2:
        return wanted
    ends = (shape[0], shape[-1])
    gray = len(shape) == 2 or (1 in ends and 3 not in ends)
    if gray and wanted in (3, ALL):
        return 1
    least = min(ends)
    more = wanted < least <= MOST_CHANNELS or (least, wanted) == (2, 3)
    if wanted == ALL or (len(shape) == 3 and wanted not in ends and more):
        return least
    return wanted


def _first(channels: int, wanted: int) -> tuple[int, str]:
    """Does what `items.first_channels` does. Gray is made of three colours."""
    return first_channels(channels, 3 if (channels, wanted) == (3, 1) else wanted)


@contextmanager
def _member(file: str | bytes) -> Iterator[tuple[BinaryIO, str]]:
    """Opens the array of a file. Yields the opened array, and a remark on arrays left out."""
    with opened(file) as outer:
        start = outer.read(len(MAGIC))
        outer.seek(0)
        if start == MAGIC:
            yield outer, ""
            return
        with zipfile.ZipFile(outer) as archive:
            names = [name for name in archive.namelist() if name.endswith(NPY)]
            if not names:
                raise ValueError("an archive without an array")
            known = [f"{name}{NPY}" for name in IMAGE_NAMES if f"{name}{NPY}" in names]
            name = known[0] if known else _first_image(archive, names)
            remark = "" if len(names) == 1 else f"array {name[:-4]} of {len(names)} arrays"
            with archive.open(name) as inner:
                yield cast("BinaryIO", inner), remark


def _first_image(archive: zipfile.ZipFile, names: list[str]) -> str:
    """Returns the first array of two or more dimensions, or the first array."""
    for name in names:
        with archive.open(name) as member, suppress(ValueError):
            if len(array_header(cast("BinaryIO", member))[0]) > 1:
                return name
    return names[0]
