"""Pages and channels of TIFF files, read by tifffile. `choose` says which are read of a file that
has more than the encoder takes.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from mocofast.data.items import ALL, WHOLE, first_channels

INSTALL = "pip install 'mocofast[images]'"


class Choice(NamedTuple):
    """The part of a file that is read."""

    pages: tuple[int, ...]  # position on every axis but Y, X, C and S
    axes: str  # as given, with C for pages that are channels
    channels: slice  # of the channels, on the axis C or S
    remark: str  # words for the log, "" if the whole file is read


def choose(axes: str, shape: tuple[int, ...], alpha: int, wanted: int, part: int = WHOLE) -> Choice:
    """Chooses channels and a page.

    axes, shape: of the file, in tifffile's letters: Y, X, S (samples of a pixel), C
        (channels), and other letters for pages (Z depth, T time, Q and I unknown).
    alpha: number of channels of transparency at the end, as for `items.first_channels`.
    wanted: number of channels that the encoder takes, or ALL.
    part: number of the page, from 0, over all axes of pages. WHOLE is the page in the middle.

    Channels: all if their number is `wanted` or 1, otherwise the first `wanted`. Of 2
    channels where 3 are wanted: the first.
    Pages: the page in the middle. If `wanted` pages of an unknown kind exist, and one
    channel, the pages are the channels.
    """
    if "C" not in axes and "S" not in axes and len(axes) == 3:
        fits = {wanted} if wanted != ALL else set(shape)
        axes = "".join("C" if a in "QI" and n in fits else a for a, n in zip(axes, shape))
    sizes = dict(zip(axes, shape))
    count = sizes.get("S", 1) * sizes.get("C", 1)
    pages = [letter for letter in axes if letter not in "YXSC"]
    stop, remark = first_channels(count, wanted, alpha)
    remarks = [remark] if remark else []
    counts = [sizes[letter] for letter in pages]
    if part != WHOLE:
        if part >= math.prod(counts):
            raise ValueError(f"has {math.prod(counts)} pages, not page {part + 1}")
        place = tuple(int(i) for i in np.unravel_index(part, counts)) if counts else ()
        return Choice(place, axes, slice(0, stop), remark)
    for letter in pages:
        if sizes[letter] > 1:
            remarks.append(f"page {sizes[letter] // 2 + 1} of {sizes[letter]} (axis {letter})")
    middle = tuple(sizes[letter] // 2 for letter in pages)
    return Choice(middle, axes, slice(0, stop), ", ".join(remarks))


@contextmanager
def opened_series(file: str | bytes, page: int, stack: bool) -> Iterator[Any]:
    """Opens the series of tifffile that begins with a page.

    page: number of the page, from 0.
    stack: more pages of equal size and type follow.

    Raises ImportError without tifffile.
    """
    try:
        from tifffile import TiffFile
    except ImportError as error:
        raise ImportError(f"this kind of TIFF needs tifffile: {INSTALL}") from error
    # One line a file, for example for a nodata value that is no number of the file's type.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)

    def opened_as(**flags: bool) -> Any:
        return TiffFile(io.BytesIO(file) if isinstance(file, bytes) else file, **flags)

    def first(tiff: Any) -> Any:
        found = (series for series in tiff.series if series.keyframe.index == page)
        return next(found, tiff.series[0])

    with opened_as() as tiff:
        # Pages that were written one after the other are series of their own.
        if not (stack and tiff.is_shaped and set(first(tiff).axes) <= set("YXS")):
            yield first(tiff)
            return
    with opened_as(is_shaped=False) as tiff:
        yield first(tiff)


def read_planes(series: Any, choice: Choice) -> tuple[np.ndarray, str]:
    """Returns the chosen page of a series, and the letters of its axes.

    The axes: C (if the file has it), Y, X and S. Planes that are not chosen are not read.
    """
    axes, shape = choice.axes, series.shape
    plane = [letter for letter in axes if letter in "YXS"]
    leading = axes[: min(axes.index("Y"), axes.index("S") if "S" in axes else len(axes))]
    if set(leading) | set(plane) != set(axes):  # axes in an unusual order
        values = series.asarray()
        index = iter(choice.pages)
        keep = [slice(None) if letter in "CYXS" else next(index) for letter in axes]
        return values[tuple(keep)], "".join(letter for letter in axes if letter in "CYXS")
    sizes = dict(zip(axes, shape))
    channels = range(sizes.get("C", 1))[choice.channels]
    planes = []
    for channel in channels:
        index = iter(choice.pages)
        position = [channel if letter == "C" else next(index) for letter in leading]
        number = 0
        for place, letter in zip(position, leading):
            number = number * sizes[letter] + place
        planes.append(_read_plane(series, number, [sizes[letter] for letter in plane]))
    return np.stack(planes), "C" + "".join(plane)


def _read_plane(series: Any, number: int, shape: list[int]) -> np.ndarray:
    """Returns one plane of a series, in `shape`. number: of the plane."""
    offset = series.dataoffset  # not None where all planes lie in one piece
    if (offset is not None and len(series.pages) <= number) or (
        offset is not None and series.pages[number] is None
    ):
        handle = series.parent.filehandle
        dtype = np.dtype(series.dtype).newbyteorder(series.parent.byteorder)
        count = int(np.prod(shape))
        handle.seek(offset + number * count * dtype.itemsize)
        return handle.read_array(dtype, count).reshape(shape)
    page = series.pages[number]
    return page.asarray().reshape(shape)
