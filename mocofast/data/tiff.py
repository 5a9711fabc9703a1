"""TIFF files: what their tags say, and the numbers of kinds that PIL reads wrongly or not at all.

PIL reads the tags, and tifffile the numbers.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mocofast.data.items import ALL, WHOLE, opened
from mocofast.data.ranges import Pixels, type_bounds
from mocofast.data.tiff_colors import CHANNELS, CMYK, ICC_LAB, LAB, divided, to_rgb
from mocofast.data.tiff_pages import choose, opened_series, read_planes

MOTOROLA_BIGTIFF = b"MM\0+"
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", MOTOROLA_BIGTIFF)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
JPEG = 7  # code of the compression
# Codes of compressions: none, fax, LZW, JPEG, deflate, PackBits, Zstandard. PIL knows more.
DALI_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000})
PIL_COMPRESSIONS = DALI_COMPRESSIONS | {6, 32771, 34676, 34677, 34925}
HOLLOW = 16  # bytes of pixels per byte of a file without compression
REDUCED = 1 | 4  # bits of NewSubfileType: a smaller copy, a mask
PREVIEWS = 8  # pages of smaller copies before the picture
# Orientation: the transposition of (H, W) and the flips that set an image upright.
TURNS = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1)} | {
    8: (1, 1, 0)
}


# An entry of warnings.filters: action, message, category, module, line number.
_NO_PIL_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@contextmanager
def no_pil_warnings() -> Iterator[None]:
    """Ignores PIL's warnings until the `with` block ends."""
    # The entry is inserted and removed here, because warnings.catch_warnings is not for
    # threads: it restores the filters of the whole process, also those that another thread
    # has set meanwhile. Every thread adds an entry of its own. If catch_warnings elsewhere
    # replaces the list in between, the entry may be gone already.
    filters = cast("list[Any]", warnings.filters)
    filters.insert(0, _NO_PIL_WARNINGS)
    try:
        yield
    finally:
        with suppress(ValueError):
            cast("list[Any]", warnings.filters).remove(_NO_PIL_WARNINGS)


class Tags(NamedTuple):
    """The tags that decide how a file is read, of the first page that is no smaller copy."""

    height: int  # as the image is shown, after the orientation
    width: int
    bits: tuple[int, ...]  # per channel
    formats: tuple[int, ...]  # per channel: 1 unsigned, 2 signed, 3 float
    photometric: int
    channels: int
    extra: tuple[int, ...]  # kinds of the channels beside the colours: 0 unknown, 1 and 2 alpha
    orientation: int
    compression: int
    planar: bool  # every channel lies apart
    stack: bool  # more pages of equal size and type, or ImageJ's planes
    nodata: float | None
    hollow: bool  # not compressed, and much larger than the file: a damaged header
    sparse: bool  # some tiles are not stored: their numbers are the mark of missing values, or 0
    page: int  # number of the page: not 0 after smaller copies
    motorola: bool  # BigTIFF of numbers whose first byte is the largest: PIL does not open it

    @property
    def associated(self) -> bool:
        """True if the colours were multiplied by the transparency."""
        return self.extra.count(1) == 1 and self.photometric in (BLACK_IS_ZERO, RGB)

    @property
    def colored(self) -> bool:
        """True if the first channels are colours, of which gray is made."""
        return self.photometric in (RGB, PALETTE, YCBCR, *CHANNELS)

    def channels_read(self, wanted: int) -> int:
        """Returns how many channels are read where the encoder takes `wanted`."""
        return 3 if wanted == 1 and self.colored else wanted

    @property
    def opened_by_pil(self) -> bool:
        """True if PIL decodes the pixels of the page that is read."""
        known = self.compression in PIL_COMPRESSIONS and not self.motorola
        return known and not (self.sparse or self.page)

    @property
    def alpha(self) -> int:
        """Number of channels of transparency: 0 or 1."""
        return 1 if self.extra and self.extra[-1] in (1, 2) else 0

    @property
    def plain(self) -> bool:
        """True for kinds that DALI was seen to decode as PIL does, to 1 of 255."""
        if not pil_reads(self) or self.orientation != 1 or self.planar or self.nodata is not None:
            return False
        if not set(self.bits) <= {1, 8, 16}:
            return False
        if self.compression not in DALI_COMPRESSIONS:
            return False
        if self.photometric == BLACK_IS_ZERO:
            return self.channels == 1
        if self.photometric == YCBCR and self.compression != JPEG:
            return False
        colors = self.photometric in (RGB, PALETTE, YCBCR)
        return colors and (not self.extra or self.extra[0] == 2)


def read_tags(file: str | bytes) -> Tags | None:
    """Returns the tags of a file, or None for a file that is no TIFF.

    Raises nearly any exception for a damaged file.
    """
    with opened(file) as content:
        if content.read(4) not in MAGIC:
            return None
        with no_pil_warnings():
            return _read_tags(content)


def _read_tags(file: BinaryIO) -> Tags:
    """Reads the tags of a page, and looks at the next page."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(8)
    if 43 in head[2:4]:  # BigTIFF
        head += file.read(8)
    first = start = _directory(file, head, 0)
    page = 0
    while int(first.get(254, 0)) & REDUCED and first.next and page < PREVIEWS:
        first, page = _directory(file, head, first.next), page + 1
    if int(first.get(254, 0)) & REDUCED:  # there are smaller copies alone
        first, page = start, 0
    stack = False
    if first.next:
        try:
            second = _directory(file, head, first.next)
            # PIL reads no tags, without an exception, from a page that is cut off.
            stack = not len(second) or _alike(first, second)
        except Exception:  # PIL raises nearly any exception. tifffile decides on this file
            stack = True
    height, width = int(first[257]), int(first[256])
    orientation = int(first.get(274, 1))
    if orientation in (5, 6, 7, 8):
        height, width = width, height
    photometric = int(first.get(262, 0))
    compression = int(first.get(259, 1))
    channels = int(first.get(277, 3 if compression == JPEG and photometric in (RGB, YCBCR) else 1))
    text = str(first.get(270, ""))
    nodata = None
    with suppress(ValueError):
        nodata = float(str(first.get(42113, "")).strip("\0 "))
    bits = tuple(first.get(258, (1,)))
    extra = tuple(first.get(338, ()))
    # Some writers leave the kinds of the extra channels out.
    known = {RGB: 3, YCBCR: 3, **CHANNELS}.get(photometric, 1)
    extra = (extra + (0,) * channels)[: max(0, channels - known)]
    stack = bits != (1,) and (stack or _planes_in_one_page(text))
    stored = np.ravel(first.get(325) or first.get(279) or 1)  # bytes of every tile or strip
    return Tags(
        height,
        width,
        bits * channels if len(bits) == 1 else bits,
        tuple(first.get(339, (1,))),
        photometric,
        channels,
        extra,
        orientation,
        compression,
        int(first.get(284, 1)) == 2,
        stack,
        nodata,
        compression == 1 and height * width * channels * max(bits) > 8 * HOLLOW * length,
        not stored.all(),
        page,
        head.startswith(MOTOROLA_BIGTIFF),
    )


def _directory(file: BinaryIO, head: bytes, place: int) -> ImageFileDirectory_v2:
    """Returns the tags of the page at a place of the file, 0: of the first page."""
    motorola = head.startswith(MOTOROLA_BIGTIFF)
    found = ImageFileDirectory_v2(head[:8] if motorola else head)
    if motorola:  # PIL takes the file for no BigTIFF
        found._bigtiff, found.next = True, int.from_bytes(head[8:16], "big")
    file.seek(place or found.next)
    found.load(file)
    return found


def _alike(first: ImageFileDirectory_v2, second: ImageFileDirectory_v2) -> bool:
    """True if two pages have one size and type, and the second is no smaller copy or mask."""
    same = all(first.get(tag) == second.get(tag) for tag in (256, 257, 258, 277, 339))
    return same and not int(second.get(254, 0)) & REDUCED


def _planes_in_one_page(text: str) -> bool:
    """True for ImageJ's description of several planes."""
    found = re.search(r"^images=(\d+)", text, re.MULTILINE)
    return text.startswith("ImageJ=") and found is not None and int(found[1]) > 1


def pil_reads(tags: Tags) -> bool:
    """True for kinds whose 8 bits PIL reads as they are meant.

    PIL cuts RGB of 16 bits to 8 bits.
    """
    if not tags.opened_by_pil:
        return False
    if tags.photometric == ICC_LAB or (tags.associated and tags.channels == 2):
        return False
    if tags.photometric == CMYK and tags.extra:
        return False
    if tags.planar and (tags.associated or tags.photometric == LAB):
        return False
    if not set(tags.formats) <= {1} or tags.stack or len(tags.extra) > 1:
        return False
    bits = set(tags.bits)
    if bits == {16}:
        gray = tags.photometric == BLACK_IS_ZERO and tags.channels == 1 and tags.nodata is None
        color = tags.photometric == RGB and not tags.planar and tags.extra in ((), (2,))
        return gray or (color and tags.nodata is None)
    if bits == {8}:
        return True
    return tags.channels == 1 and bits <= {1, 2, 4}


# The type of numbers that PIL reads from TIFF of one channel, {(bits, format): type}.
_PIL_TYPES = {(8, 2): "i1", (16, 1): "u2", (16, 2): "i2", (32, 1): "u4", (32, 2): "i4"} | {
    (32, 3): "f4"
}


def pil_numbers(tags: Tags) -> np.dtype | None:
    """Returns the type of numbers of a kind that PIL reads, not scaled, or None."""
    if tags.stack or tags.channels != 1 or tags.photometric > BLACK_IS_ZERO:
        return None
    if not tags.opened_by_pil:
        return None
    if tags.photometric == WHITE_IS_ZERO and (tags.bits[0], tags.formats[0]) != (16, 1):
        return None
    found = _PIL_TYPES.get((tags.bits[0], tags.formats[0]))
    return np.dtype(found) if found else None


def count_pages(file: str | bytes, tags: Tags, wanted: int) -> int:
    """Returns the number of pages that are no channels. Arguments: as for `tiff_pixels`."""
    if not tags.stack:
        return 1
    with opened_series(file, tags.page, tags.stack) as series:
        axes, shape = series.axes, series.shape
    axes = choose(axes, shape, tags.alpha, wanted).axes
    return math.prod(size for letter, size in zip(axes, shape) if letter not in "YXSC")


def tiff_pixels(file: str | bytes, tags: Tags, wanted: int = 3, part: int = WHOLE) -> Pixels:
    """Returns the numbers of a TIFF file.

    tags: of the file.
    wanted: number of channels that the encoder takes.
    part: number of the page, or WHOLE.

    The orientation is applied, as PIL does. Raises ImportError without tifffile or a codec,
    ValueError for numbers without an order (complex), and tifffile's exceptions.
    """
    with opened_series(file, tags.page, tags.stack) as series:
        axes, shape = series.axes, series.shape
        if not {"Y", "X"} <= set(axes):
            raise ValueError(f"axes {axes} {shape} are no image")
        # These colours are made of all channels.
        mixed = tags.photometric in CHANNELS
        choice = choose(axes, shape, tags.alpha, ALL if mixed else wanted, part)
        values, letters = read_planes(series, choice)
    # (..., Y, X, ...) -> (Y, X, channels)
    if "S" not in letters:
        values, letters = values[..., None], letters + "S"
    if "C" not in letters:
        values, letters = values[None], "C" + letters
    order = [letters.index(letter) for letter in "YXCS"]
    values = values.transpose(order)
    values = values.reshape(*values.shape[:2], -1)
    if mixed:
        values = to_rgb(values, tags.photometric)
    elif tags.associated:
        values = divided(values, tags.extra)
    return oriented(values[..., choice.channels], tags)


def oriented(values: np.ndarray, tags: Tags, turn: bool = True) -> Pixels:
    """Returns numbers with their range. Where white is zero, the numbers are inverted.

    values: (H, W, C), as the file stores the numbers.
    turn: apply the orientation, which PIL has applied already.
    """
    if values.dtype.kind not in "buif":
        raise ValueError(f"pixels of type {values.dtype} have no order")
    low, high = type_bounds(values.dtype)
    if values.dtype.kind == "u" and tags.bits[0] < 8 * values.dtype.itemsize:
        high = 2.0 ** tags.bits[0] - 1
    nodata = tags.nodata
    if tags.photometric == WHITE_IS_ZERO:
        whole = values.dtype.kind != "f"
        ends = int(low) + int(high) if whole else low + high
        values = (ends - values.astype(np.int64 if whole else values.dtype)).astype(values.dtype)
        nodata = None if nodata is None else ends - nodata
    swap, rows, columns = TURNS.get(tags.orientation, (0, 0, 0)) if turn else (0, 0, 0)
    if swap:
        values = values.swapaxes(0, 1)
    values = values[:: -1 if rows else 1, :: -1 if columns else 1]
    native = values.dtype.newbyteorder("=")
    return Pixels(np.ascontiguousarray(values, dtype=native), low, high, nodata)


def remark_of(file: str | bytes, tags: Tags, wanted: int = 3) -> str:
    """Returns words on what `tiff_pixels` leaves out, "" if nothing. Arguments: as there."""
    if not tags.stack:
        shape = (tags.height, tags.width, tags.channels)
        if tags.photometric in (PALETTE, *CHANNELS):
            return ""
        return choose("YXS", shape, tags.alpha, wanted).remark
    with opened_series(file, tags.page, tags.stack) as series:
        return choose(series.axes, series.shape, tags.alpha, wanted).remark
