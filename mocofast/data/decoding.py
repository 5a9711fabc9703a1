"""Image files: what their headers say, and their pixels, as every loader, the evaluation
and `mocofast prepare` see the files.

Every function takes a file as its path, as its content, or as an `items.Item`.

PIL decodes the formats of photos. EXIF orientation is never applied, the orientation of
TIFF always, as PIL does. The numbers of other files (signed, float, many channels or
pages) are read by `read_pixels` and scaled to 8 bits by `mocofast.data.ranges`.
Other files are read by the readers of `mocofast.data.kinds`. docs/formats.md shows every kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from mocofast.data.image_codecs import codec_pixels
from mocofast.data.items import Extent, FileReader, Item, check_pixels, content_of, opened
from mocofast.data.kinds import head_of, reader_for
from mocofast.data.ranges import AUTO, Pixels, ValueRange, to_uint8
from mocofast.data.tiff import (
    BLACK_IS_ZERO,
    MAGIC,
    PALETTE,
    RGB,
    Tags,
    no_pil_warnings,
    oriented,
    pil_numbers,
    pil_reads,
    read_tags,
    remark_of,
    tiff_pixels,
)

File: TypeAlias = "str | bytes | Item"
Given: TypeAlias = "File | np.ndarray"  # a file, or pixels (H, W, C)


@contextmanager
def open_image(file: str | bytes) -> Iterator[Image.Image]:
    """Opens an image file with PIL. PIL's warnings are ignored until the `with` block ends.

    PIL warns of many pixels, of odd EXIF data and of palettes with transparency. The
    loaders can use such images. Raises what PIL.Image.open raises.
    """
    with opened(file) as content, no_pil_warnings(), Image.open(content) as image:
        yield image


class Header(NamedTuple):
    """What the header of an image file says."""

    height: int  # of the decoded image
    width: int
    format: str  # PIL's name of the format, for example "JPEG"
    # True for kinds that DALI was seen to decode as PIL does, to 1 of 255. The numbers of
    # other kinds have another meaning, or DALI refuses the files.
    plain: bool
    # True for numbers of more than 8 bits, signed or floating: `data.range` matters
    deep: bool = False
    remark: str = ""  # what is left out: "channels 1 to 3 of 13"


class _Read:
    """How a file of `kinds` is read: as a whole."""

    def __init__(self, reader: FileReader) -> None:
        self._reader = reader

    def extent(self, item: Item, wanted: int) -> Extent:
        """Returns the size of the image."""
        return self._reader.extent(item.file, wanted)

    def pixels(self, item: Item, wanted: int) -> Pixels:
        """Returns the numbers of the image."""
        return self._reader.pixels(item.file, wanted)


# A file with its reader, the tags of a TIFF, or None for a photo.
Kind: TypeAlias = "Item | Tags | None"


def kind_of(file: File) -> Kind:
    """Returns how a file is read. Opens a file once, and TIFF twice.

    Raises OSError, and nearly any exception for a damaged TIFF.
    """
    if isinstance(file, Item):
        return file
    head = head_of(file)
    if (reader := reader_for(head)) is not None:
        return Item(file, _Read(reader))
    return read_tags(file) if head.startswith(MAGIC) else None


def read_header(file: File, wanted: int = 3) -> Header:
    """Reads the header of an image file. Decodes no pixels.

    wanted: number of channels that the encoder takes.

    Raises OSError (PIL.UnidentifiedImageError is an OSError) or another exception of
    PIL where the header cannot be read, and PIL.Image.DecompressionBombError above
    twice PIL.Image.MAX_IMAGE_PIXELS.
    """
    tags = kind_of(file)
    if isinstance(tags, Item):
        size = tags.extent(wanted)
        return Header(size.height, size.width, size.format, False, size.deep, size.remark)
    assert not isinstance(file, Item)
    if tags is None:
        if (found := _plain_jpeg(file)) is not None:
            check_pixels(*found)
            return Header(*found, "JPEG", True)
        with open_image(file) as image:
            deep = image.mode[0] in "IF" or wide_color(image)
            return Header(image.height, image.width, image.format or "", _is_plain(image), deep)
    _check_bomb(tags)
    return Header(
        tags.height,
        tags.width,
        "TIFF",
        tags.plain,
        max(tags.bits) > 8 or set(tags.formats) != {1},
        remark_of(file, tags, _of_file(tags, wanted)),
    )


# Markers of JPEG: tables of Huffman codes and of quantisation, restart interval, JFIF, comment
_TABLES = {0xC4, 0xDB, 0xDD, 0xE0, 0xFE}
_FRAMES, _SCAN = {0xC0, 0xC2}, 0xDA  # baseline and progressive frames, start of the pixels


def _plain_jpeg(file: str | bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG of the commonest kind, or None: PIL reads all others.

    Reads contents of files alone, in 3 us. PIL takes 16 us, longer than libjpeg takes to decode
    an image of 32 pixels. Files with EXIF, a colour profile or unusual segments are PIL's.
    """
    if not isinstance(file, bytes) or not file.startswith(b"\xff\xd8\xff"):
        return None
    place, size = 2, None
    while len(file) >= place + 4 and file[place] == 0xFF:
        marker, begin = file[place + 1], place + 4
        place += 2 + int.from_bytes(file[place + 2 : begin], "big")
        if place < begin or place > len(file):
            return None
        if marker in _FRAMES:
            if size is not None or place - begin < 6 or file[begin] != 8:
                return None
            if file[begin + 5] not in (1, 3) or place - begin != 6 + 3 * file[begin + 5]:
                return None
            height, width = (int.from_bytes(file[begin + i : begin + i + 2], "big") for i in (1, 3))
            size = (height, width) if height and width else None
        elif marker == 0xDB:  # PIL refuses a table that is cut short
            if (place - begin) % 65 or any(file[i] > 15 for i in range(begin, place, 65)):
                return None
        elif marker == _SCAN:
            return size
        elif marker not in _TABLES:
            return None
    return None


def _of_file(tags: Tags | None, wanted: int) -> int:
    """Returns how many channels are read where the encoder takes `wanted`.

    tags: of a TIFF file, None for a photo. Gray is made of three colours.
    """
    if tags is not None:
        return tags.channels_read(wanted)
    return 3 if wanted == 1 else wanted


def image_size(file: File) -> tuple[int, int]:
    """Returns (height, width) from the header of an image file. Raises as `read_header`."""
    return read_header(file)[:2]


def decode(item: Given, value_range: ValueRange = AUTO) -> Image.Image:
    """Returns an RGB image.

    item: a file, or pixels (H, W, 3) uint8.
    value_range: the numbers that mean black and white (`ranges.to_uint8`).

    Transparency is dropped: the colour under transparent pixels shows. Grey of more than
    8 bits is scaled to 8 bits. Of an animation the first frame is taken. Of several
    channels or pages `tiff_pages.choose` says which are taken. Raises what PIL raises on a bad
    file, which is nearly any exception.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    tags = kind_of(item)
    if isinstance(tags, Item):
        return _rgb(tags.pixels(3), value_range)
    assert not isinstance(item, Item)
    if tags is not None:
        _check_bomb(tags)
    if value_range.of_type and (tags is None or (pil_reads(tags) and tags.nodata is None)):
        with open_image(item) as image:
            try:
                image.load()
            except OSError:
                if image.format != "JPEG2000":
                    raise
                # PIL refuses some files with boxes of GDAL.
                return _rgb(codec_pixels(item, "jpeg2k", 3), value_range)
            if image.mode == "F":
                numbers = Pixels(np.asarray(image)[..., None], 0.0, 1.0)
                return _rgb(numbers, value_range)
            if image.mode.startswith("I"):  # 16 bits: "I;16" from PNG and TIFF, "I" from PGM
                wide = np.asarray(image).astype(np.int64).clip(0, 65535)
                scaled = ((wide * 255 + 32767) // 65535).astype(np.uint8)
                return Image.fromarray(scaled).convert("RGB")
            return image.convert("RGB")
    return _rgb(pixels_of(item, tags, 3), value_range)


def read_pixels(file: File, wanted: int = 3) -> Pixels:
    """Returns the numbers of an image file, not scaled: (H, W, C) of the file's type.

    wanted: number of channels that the encoder takes. C is `wanted` if the file has as
        many channels, or more. Three colours are read for 1 channel. Transparency is dropped.

    Colour models other than gray and RGB become RGB of 8 bits. Raises as `decode`, and
    ImportError with a pip command if a library is missing.
    """
    return pixels_of(file, kind_of(file), wanted)


def pixels_of(file: File, tags: Kind, wanted: int) -> Pixels:
    """Does what `read_pixels` does. tags: the result of `kind_of`."""
    if isinstance(tags, Item):
        return tags.pixels(wanted)
    assert not isinstance(file, Item)
    wanted = _of_file(tags, wanted)
    if tags is not None:
        _check_bomb(tags)
        several = tags.channels > 1 and tags.photometric in (BLACK_IS_ZERO, RGB)
        if not pil_reads(tags) or (several and (wanted != 3 or max(tags.bits) > 8)):
            if (dtype := pil_numbers(tags)) is None:
                return tiff_pixels(file, tags, wanted)
            with open_image(file) as image:
                return oriented(np.asarray(image).astype(dtype)[..., None], tags, turn=False)
    # A colour map gives numbers of files a meaning: the mark of missing values is no colour.
    nodata = None if tags is None or tags.photometric == PALETTE else tags.nodata
    with open_image(file) as image:
        if image.format == "JPEG2000" or wide_color(image):
            return codec_pixels(file, "jpeg2k" if image.format == "JPEG2000" else "png", wanted)
        if image.format == "PPM" and (pixels := _binary_pnm(file)) is not None:
            return pixels
        image.load()
        values = np.asarray(image)
        if image.mode == "F":
            return Pixels(values[..., None], 0.0, 1.0)
        if image.mode.startswith("I"):
            return Pixels(values.clip(0, 65535).astype(np.uint16)[..., None], 0.0, 65535.0)
        if image.mode in ("1", "L", "LA"):
            return Pixels(np.asarray(image.convert("L"))[..., None], 0.0, 255.0, nodata)
        return Pixels(np.asarray(image.convert("RGB")), 0.0, 255.0, nodata)


def _rgb(pixels: Pixels, value_range: ValueRange) -> Image.Image:
    """Returns numbers (H, W, 3) or (H, W, 1), scaled to 8 bits, as an RGB image.

    Gray becomes three equal colours. A range with a pair per channel scales each by its own.
    """
    if pixels.values.shape[2] == 1 and len(value_range.numbers) == 6:
        pixels = pixels._replace(values=pixels.values.repeat(3, axis=2))
    levels = to_uint8(pixels, value_range)
    if levels.shape[2] not in (1, 3):
        raise ValueError(f"has {levels.shape[2]} channels, not data.channels=3")
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0]).convert("RGB")


def _check_bomb(tags: Tags) -> None:
    """Raises PIL's DecompressionBombError, as PIL does when it opens a file.

    Raises OSError for a file that is much shorter than its pixels.
    """
    if tags.hollow:
        raise OSError(f"truncated: the file is too short for {tags.width} x {tags.height} pixels")
    check_pixels(tags.height, tags.width)


def _tiles(image: Image.Image) -> list[Any]:
    """Returns PIL's plan of decoding: (decoder, box, offset, arguments) of every tile."""
    return getattr(image, "tile", [])


def _is_plain(image: Image.Image) -> bool:
    """True for kinds that DALI was seen to decode as PIL. image: opened, not loaded."""
    mode, tile = image.mode, next(iter(_tiles(image)), None)
    raw = str(tile[3][0] if isinstance(tile[3], tuple) else tile[3]) if tile else ""
    moving = getattr(image, "is_animated", False)
    if image.format in ("JPEG", "MPO"):
        return mode in ("L", "RGB", "CMYK")
    if image.format == "PNG":
        return mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") and not moving
    if image.format == "BMP":
        return tile is not None and tile[0] == "raw" and raw in ("BGR", "BGRA", "L", "P")
    if image.format == "WEBP":
        return not moving
    if image.format == "PPM":  # of maxval 255: PIL scales all others
        return tile is not None and tile[0] == "raw" and mode in ("L", "RGB")
    # Of JPEG 2000 damaged headers end the process, in nvImageCodec's parser and in its decoder.
    return False


def wide_color(image: Image.Image) -> bool:
    """True for a PNG of more than one channel of 16 bits, which PIL cuts to 8 bits."""
    return (
        image.format == "PNG"
        and any(";16" in str(tile[3]) for tile in _tiles(image))
        and (not image.mode.startswith("I"))
    )


_PNM_HEADER = re.compile(rb"(P[56])(?:\s+|#[^\n]*\n)+?(\d+)(?:\s+|#[^\n]*\n)+?(\d+)"
                         rb"(?:\s+|#[^\n]*\n)+?(\d+)\s")  # fmt: skip


def _binary_pnm(file: str | bytes) -> Pixels | None:
    """Returns the numbers of a binary PGM or PPM file, or None for other PNM files.

    PIL scales the numbers by the largest number that the header states.
    """
    content = content_of(file)
    if not (found := _PNM_HEADER.match(content)):
        return None
    width, height, top = (int(found[i]) for i in (2, 3, 4))
    channels = 3 if found[1] == b"P6" else 1
    dtype = np.dtype(">u2" if top > 255 else "u1")
    values = np.frombuffer(content, dtype, height * width * channels, found.end())
    return Pixels(
        values.reshape(height, width, channels).astype(dtype.newbyteorder("=")), 0.0, float(top)
    )
