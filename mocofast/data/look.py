"""A look at a few images before the first step: images that teach an encoder little, and the
option that mends the set.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mocofast.data.arrays import PixelFormat
from mocofast.data.deadline import in_time
from mocofast.data.decoding import decode
from mocofast.data.finding import counted, shortened
from mocofast.data.interface import Source, read_seconds
from mocofast.data.ranges import range_of
from mocofast.data.remarks import images_to_look_at
from mocofast.errors import describe_error, printable
from mocofast.view_sizes import Size, height_width, pixels_text

SECONDS = 5.0  # for every set: large images take long
FEW_LEVELS = 20  # of 256
CLIPPED = 0.5  # share of the values of an image that are the smallest or the largest
SMALLEST = 256  # pixels of an image whose levels are counted
# A remark needs this share of the images. Some blank tiles or scans of text do no harm.
WORTH_A_LINE = 1 / 8


class Seen(NamedTuple):
    """An image as an encoder sees the pixels."""

    name: str
    size: tuple[int, int]  # height, width
    levels: int  # different values, of 256
    clipped: float  # share of values 0 and 255
    error: str  # why the image does not decode, or ""


def look(
    train: Source, val: Source | None, size: Size, pixels: PixelFormat | None = None
) -> list[str]:
    """Returns lines on images of few values, on images that do not decode, and on sizes.

    train, val: the sets of a run. Images in memory are not looked at.
    size: of a view.
    pixels: how images are read that are not 8-bit RGB.
    """
    seen = _look_at(train, pixels)
    good = [image for image in seen if not image.error]
    lines = []
    bad = [image for image in seen if image.error]
    if bad:
        lines.append(
            f"{len(bad)} of {counted(len(seen), 'image')} looked at cannot be decoded: "
            f"{printable(bad[0].name)} ({printable(bad[0].error)})"
        )
    large = [image for image in good if image.size[0] * image.size[1] >= SMALLEST]
    constant = [image for image in large if image.levels == 1]
    few = [image for image in large if 1 < image.levels < FEW_LEVELS]
    clipped = [image for image in large if image.levels >= FEW_LEVELS and image.clipped > CLIPPED]
    mend = (
        "--data.exclude PATTERN leaves masks out, --data.range MIN,MAX scales files of more than "
        "8 bits"
    )
    for images, words in (
        (constant, "have one value in all pixels"),
        (few, f"have fewer than {FEW_LEVELS} levels of 256"),
        (clipped, f"have 0 or 255 in more than {CLIPPED:.0%} of the values (clipped, or a margin)"),
    ):
        if images and len(images) >= WORTH_A_LINE * len(seen):
            names = shortened(image.name for image in images[:3])
            lines.append(
                f"{len(images)} of {counted(len(seen), 'image')} looked at {words}: {names}; {mend}"
            )
    return lines + _on_sizes(good, [] if val is None else _look_at(val, pixels), size)


def _look_at(source: Source, pixels: PixelFormat | None) -> list[Seen]:
    """Returns what images of a source look like."""
    begin, seen = time.monotonic(), []
    for index in images_to_look_at(source):
        found = in_time(read_seconds(source), _seen, source, index, pixels)
        if isinstance(found, str):
            found = Seen(source.name(index), (0, 0), 0, 0.0, found)
        seen.append(found)
        if time.monotonic() - begin > SECONDS:
            break
    return seen


def _seen(source: Source, index: int, how: PixelFormat | None) -> Seen:
    name, item = source.name(index), source.load(index)
    try:
        pixels = how.load(item) if how else np.asarray(decode(item, range_of(source)))
    except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
        return Seen(name, (0, 0), 0, 0.0, describe_error(error))
    count = np.bincount(pixels.ravel(), minlength=np.iinfo(pixels.dtype).max + 1)
    clipped = float(count[0] + count[-1]) / pixels.size
    return Seen(name, pixels.shape[:2], int((count > 0).sum()), clipped, "")


def _on_sizes(train: Sequence[Seen], val: Sequence[Seen], size: Size) -> list[str]:
    """Returns lines on sets whose images all have one size."""
    sizes = {image.size for image in train}
    val_sizes = {image.size for image in val if not image.error}
    lines = []
    if len(sizes) == 1 and len(train) > 1:
        height, width = next(iter(sizes))
        short = min(height, width)
        tall, wide = height_width(size)
        if height < tall or width < wide:
            # Four times the size of the image: accuracy is equal to a point (docs/evaluation.md).
            evaluated = 4 * short
            faster = f", --knn.size {evaluated} makes evaluations of ResNets faster"
            fits = short if tall == wide else f"{min(height, tall)},{min(width, wide)}"
            lines.append(
                f"all images looked at have {height} x {width} pixels, and are enlarged to views "
                f"of {pixels_text(size)}: --augment.size {fits} makes views as large as the images"
                + (faster if evaluated < min(tall, wide) else "")
            )
        if len(val_sizes) == 1 and len(val) > 1 and val_sizes != sizes:
            val_height, val_width = next(iter(val_sizes))
            lines.append(
                f"training images have {height} x {width} pixels, evaluation images {val_height} x "
                f"{val_width}: sizes tell the sets apart; mocofast prepare --size "
                f"{min(short, val_height, val_width)} makes all short sides equal"
            )
    return lines
