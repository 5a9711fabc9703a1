"""Files that imagecodecs decodes: PNG of 16 bits and several channels, and JPEG 2000.

PIL reads most JPEG 2000. The functions of `items.FileReader` are for the rest: signed numbers, and
more than four channels.
"""

from __future__ import annotations

import numpy as np

from mocofast.data.items import WHOLE, Extent, check_pixels, content_of, first_channels, opened
from mocofast.data.ranges import Pixels
from mocofast.data.tiff_pages import INSTALL

JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"  # the first box of the container
CODESTREAM = b"\xff\x4f\xff\x51"  # SOC and SIZ, the first markers of the code itself
_LONG_HEAD = 1 << 16  # bytes that hold the header of a file


def is_beyond_pil(head: bytes) -> bool:
    """Returns whether a file is JPEG 2000 of signed numbers, or of more than four channels.

    head: the first bytes of the file.
    """
    if not head.startswith((JP2, CODESTREAM)) or (found := _header(head)) is None:
        return False
    _, _, channels, kind = found
    return channels > 4 or (kind != 255 and kind >= 128)


def extent(file: str | bytes, wanted: int, part: int = WHOLE) -> Extent:
    """Returns the size of an image. Arguments: as `items.FileReader`."""
    with opened(file) as content:
        found = _header(content.read(_LONG_HEAD))
    if found is None:
        raise ValueError("JPEG 2000 without a header")
    height, width, channels, kind = found
    check_pixels(height, width)
    return Extent(height, width, kind != 7, first_channels(channels, wanted)[1], "JPEG2000")


def pixels(file: str | bytes, wanted: int, part: int = WHOLE) -> Pixels:
    """Returns the numbers of an image. Arguments: as `items.FileReader`."""
    extent(file, wanted)
    return codec_pixels(file, "jpeg2k", wanted)


def count(file: str | bytes) -> int:
    """Returns 1."""
    return 1


def codec_pixels(file: str | bytes, codec: str, wanted: int) -> Pixels:
    """Returns the numbers of a file by imagecodecs.

    codec: "png" or "jpeg2k". wanted: number of channels that the encoder takes.
    """
    try:
        import imagecodecs
    except ImportError as error:
        raise ImportError(f"this kind of file needs imagecodecs: {INSTALL}") from error
    content = content_of(file)
    values = np.asarray(getattr(imagecodecs, f"{codec}_decode")(content))
    values = values.reshape(*values.shape[:2], -1)
    values = values[..., : first_channels(values.shape[2], wanted)[0]]
    bits = _bits(content) if codec == "jpeg2k" else 8 * values.dtype.itemsize
    low = -(2.0 ** (bits - 1)) if values.dtype.kind == "i" else 0.0
    return Pixels(values, low, low + 2.0**bits - 1)


def _bits(content: bytes) -> int:
    """Returns the bits of the first channel of a JPEG 2000 file: byte 40 of its SIZ segment."""
    start = content.index(CODESTREAM) + 2
    return (content[start + 40] & 127) + 1


def _header(head: bytes) -> tuple[int, int, int, int] | None:
    """Returns (height, width, channels, kind) of JPEG 2000, or None if the header is not there.

    kind: bits - 1, and 128 more for signed numbers. 255: the channels differ.
    """

    def number(place: int, length: int = 4) -> int:
        return int.from_bytes(head[place : place + length], "big")

    if head.startswith(CODESTREAM):
        height, width = (number(12 - i) - number(20 - i) for i in (0, 4))
        place = 40
        found = height, width, number(place, 2), head[place + 2] if len(head) > place + 2 else 255
    else:
        start = head.find(b"ihdr") + 4
        if start < 4 or len(head) < start + 11:
            return None
        found = number(start), number(start + 4), number(start + 8, 2), head[start + 10]
    return found if min(found[:3]) > 0 else None
