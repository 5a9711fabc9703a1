"""What readers of files share: the size of an image, and a file with the reader of the user's set.

A reader has three functions. `extent` tells the size, `pixels` reads the numbers, and `count`
tells how many images a file holds (slices, frames).
"""

from __future__ import annotations

import io
import os
import stat
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mocofast.data.ranges import Pixels

WHOLE = -1  # the part of a file that a reader takes by default
ALL = 0  # as the number of wanted channels: all channels of the file


class Extent(NamedTuple):
    """The size of an image, and what is left out of the file."""

    height: int
    width: int
    # True for numbers of more than 8 bits, signed or floating: `data.range` matters
    deep: bool = True
    remark: str = ""  # what is left out: "frame 16 of 30"
    format: str = ""  # name of the format


class FileReader(Protocol):
    """Reads the files of one format. A module may serve as a reader.

    file: a path or a content.
    wanted: number of channels that the encoder takes, or ALL. A reader returns the channels of
        the file, or `wanted` if the file has more.
    part: number of an image in the file, from 0, or WHOLE.
    """

    def extent(self, file: str | bytes, wanted: int, part: int = WHOLE) -> Extent:
        """Reads the header of a file. Raises nearly any exception for a bad file."""
        ...

    def pixels(self, file: str | bytes, wanted: int, part: int = WHOLE) -> Pixels:
        """Returns the numbers of an image. Raises as `extent`, and ImportError with a pip
        command if a library is missing.
        """
        ...

    def count(self, file: str | bytes) -> int:
        """Returns how many images a file holds. Raises as `extent`."""
        ...


class Item(NamedTuple):
    """A file, or a part of a file, that is read as the options of the set say."""

    file: str | bytes
    reading: Any  # has methods `extent(item, wanted)` and `pixels(item, wanted)`
    # () the whole file, (n,) a slice, (top, left, height, width) a window
    part: tuple[int, ...] = ()
    name: str = ""  # of the file

    def extent(self, wanted: int) -> Extent:
        """Returns the size of the image. wanted: number of channels that the encoder takes."""
        found: Extent = self.reading.extent(self, wanted)
        return found

    def pixels(self, wanted: int) -> Pixels:
        """Returns the numbers of the image, (H, W, C). wanted: as for `extent`."""
        found: Pixels = self.reading.pixels(self, wanted)
        return found


def opened(file: str | bytes) -> BinaryIO:
    """Returns a file, opened for reading.

    Raises OSError for a pipe, a socket or a device, which may never answer.
    """
    if isinstance(file, bytes):
        return io.BytesIO(file)
    content = open(file, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(content.fileno()).st_mode):
        content.close()
        raise OSError(f"{file!r} is a pipe, socket or device, not a regular file")
    return content


def content_of(file: str | bytes) -> bytes:
    """Returns the content of a file, in half the time of np.fromfile. Raises OSError."""
    if isinstance(file, bytes):
        return file
    with open(file, "rb", buffering=0) as content:
        return content.read()


def _without_waiting(file: str, flags: int) -> int:
    """Opens a file. The open of a pipe without a writer does not wait."""
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def check_pixels(height: int, width: int) -> None:
    """Raises PIL's DecompressionBombError above twice PIL.Image.MAX_IMAGE_PIXELS, as PIL does."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels are more than {2 * limit}: a bomb?"
        )


def first_channels(count: int, wanted: int, alpha: int = 0) -> tuple[int, str]:
    """Returns how many channels are read of a file with `count`, and a remark or "".

    alpha: number of channels of transparency at the end. These are read where `wanted` is 2, or
        4 or more, and the number of all channels: GDAL calls the infrared of 4 bands so.

    All are read if their number is `wanted` or 1, otherwise the first `wanted`. Of 2 channels
    where 3 are wanted: the first.
    """
    if wanted == 3 or wanted != count:
        count -= alpha
    stop = count if count == 1 or wanted in (count, ALL) else min(count, wanted)
    if count == 2 and wanted == 3:
        stop = 1
    if stop == count:
        return stop, ""
    first = "channel 1" if stop == 1 else f"channels 1 to {stop}"
    return stop, f"{first} of {count} (data.channels={count} reads all)"


def native(values: np.ndarray) -> np.ndarray:
    """Returns numbers in the byte order of the machine. Raises ValueError for other types."""
    if values.dtype.kind not in "buif":
        raise ValueError(f"numbers of type {values.dtype} have no order")
    return values.astype(values.dtype.newbyteorder("="), copy=False)
