"""Remarks on a few images of a source: what the reader leaves out, and which numbers the
files hold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mocofast.data.deadline import in_time
from mocofast.data.decoding import Header, read_header, read_pixels
from mocofast.data.interface import Source, read_seconds
from mocofast.data.items import Item
from mocofast.data.ranges import Pixels, has_own_range, missing_values, range_of

LOOKED_AT = 32  # images
MEASURED = 8  # images whose numbers are read
FEW = 1 / 4  # of the range of the type: numbers that stay below fill at most 64 of 256 levels


class Numbers(NamedTuple):
    """The lowest and the highest number that images hold."""

    dtype: np.dtype
    low: float
    high: float
    top: float  # the number that means white, by the type

    def joined(self, other: Numbers) -> Numbers:
        """Returns the numbers of more images of one type."""
        return Numbers(
            self.dtype,
            min(self.low, other.low),
            max(self.high, other.high),
            max(self.top, other.top),
        )


def numbers_of(pixels: Pixels) -> Numbers | None:
    """Returns the lowest and the highest number of an image. None if all are missing, or if the
    file states what is black and white.
    """
    if pixels.stated:
        return None
    missing = missing_values(pixels)
    values = pixels.values if missing is None else pixels.values[~missing]
    if not values.size:
        return None
    return Numbers(pixels.values.dtype, float(values.min()), float(values.max()), pixels.high)


def suggested_range(seen: Numbers) -> str:
    """Returns a value of `data.range` for the numbers that were seen. "auto" if it serves."""
    if seen.dtype.kind == "u" and seen.dtype.itemsize > 1:
        if seen.dtype.itemsize == 2 and seen.high >= FEW * seen.top:
            return "auto"
        bits = max(8, math.ceil(math.log2(seen.high + 1)))
        return f"0,{2**bits - 1}"
    if has_own_range(seen.dtype) or (seen.low >= 0 and seen.high <= 255):
        return "auto"
    low, high = (f"{value:.6g}" for value in (seen.low, seen.high))
    return f"{low},{high}" if low != high else "auto"


def images_to_look_at(source: Source) -> list[int]:
    """Returns the indices of up to LOOKED_AT images. None for images in memory.

    Files of a folder are taken from everywhere. Of an archive the first images are taken,
    because an image can mean the download of a shard.
    """
    if not len(source) or isinstance(first := source.load(0), np.ndarray):
        return []
    count = min(LOOKED_AT, len(source))
    file = first.file if isinstance(first, Item) else first
    step = len(source) / count if isinstance(file, str) else 1
    return [int(i * step) for i in range(count)]


def remarks(source: Source, channels: int = 3) -> list[str]:
    """Returns lines on up to LOOKED_AT images. Bad images are left to the loader.

    channels: of an image, as `data.channels`.
    """
    lines, deep = _headers(source, channels)
    if range_of(source).kind != "auto":
        return lines
    return lines + _on_numbers(source, deep[:MEASURED], channels)


def left_out(source: Source, channels: int = 3) -> list[str]:
    """Returns lines on channels, pages and frames that are not read. Arguments: as `remarks`."""
    return _headers(source, channels)[0]


def _headers(source: Source, channels: int) -> tuple[list[str], list[int]]:
    """Returns lines on what is not read, and the indices of images of more than 8 bits."""
    indices = images_to_look_at(source)
    unread: dict[str, list[str]] = {}  # {remark: names}
    deep: list[int] = []
    seconds = read_seconds(source)
    for index in indices:
        header = in_time(seconds, _header, source, index, channels)
        if not isinstance(header, Header):  # a bad image
            continue
        if header.remark:
            unread.setdefault(header.remark, []).append(source.name(index))
        if header.deep:
            deep.append(index)
    lines = [
        f"{len(names)} of {len(indices)} images looked at show {remark}, for example {names[0]}"
        for remark, names in unread.items()
    ]
    return lines, deep


def _header(source: Source, index: int, channels: int) -> Header | None:
    """Returns the header of an image, None for images in memory and bad images."""
    item = source.load(index)
    try:
        return None if isinstance(item, np.ndarray) else read_header(item, channels)
    except Exception:  # PIL raises nearly any exception on corrupt headers
        return None


def _numbers(source: Source, index: int) -> Numbers | None:
    """Returns the numbers of an image, None as `_header`."""
    item = source.load(index)
    try:
        return None if isinstance(item, np.ndarray) else numbers_of(read_pixels(item))
    except Exception:  # PIL's decoders raise nearly any exception on corrupt files
        return None


def _on_numbers(source: Source, indices: list[int], channels: int) -> list[str]:
    """Returns a line for every type of number that `data.range` should describe."""
    seen: dict[np.dtype, tuple[Numbers, str]] = {}  # {type: (numbers, name of the first image)}
    seconds = read_seconds(source)
    for index in indices:
        found = in_time(seconds, _numbers, source, index)
        if not isinstance(found, Numbers):  # a bad image, or a library is missing
            continue
        before, name = seen.get(found.dtype, (found, source.name(index)))
        seen[found.dtype] = (before.joined(found), name)
    lines = []
    for numbers, name in seen.values():
        suggestion = suggested_range(numbers)
        if suggestion == "auto":
            continue
        if has_own_range(numbers.dtype):
            low, high = (int(n * 255 / numbers.top) for n in (numbers.low, numbers.high))
            levels = high - low + 1
            effect = f"fill at most {levels} of 256 levels"
        else:
            effect = "are scaled by the lowest and the highest value of every image"
        eight = channels == 3 and range_of(source).depth == 8
        deeper = ", and --data.depth 16 keeps levels beyond 256" * eight
        lines.append(
            f"{numbers.dtype} numbers from {numbers.low:.6g} to {numbers.high:.6g} ({name}) "
            f"{effect}; --data.range {suggestion} gives all images one scale{deeper}"
        )
    return lines
