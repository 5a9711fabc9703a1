"""Windows of large images: GeoTIFF scenes by rasterio, whole slides by tiffslide.

A grid of windows covers an image: windows start at every multiple of the stride, and the last
window of a row or column ends at the border.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from mocofast.data.items import first_channels, opened
from mocofast.data.ranges import Pixels
from mocofast.data.tiff import BLACK_IS_ZERO, RGB, YCBCR, Tags, oriented

SLIDES = frozenset({".svs", ".ndpi", ".scn", ".bif"})
INSTALL = "pip install 'mocofast[{}]'"
THUMBNAIL = 1024  # pixels of the longer side of the picture on which tissue is looked for
# Colour saturation (HSV, of 255) above which a pixel shows tissue: glass is gray
SATURATION = 15


def grid(size: tuple[int, int], window: int, stride: int) -> np.ndarray:
    """Returns the windows of an image, (n, 4) int64: top, left, height, width.

    size: (height, width). A side below `window` has one window, as long as the side.
    """
    starts = [_starts(side, window, stride) for side in size]
    height, width = (min(side, window) for side in size)
    return np.array([(top, left, height, width) for top in starts[0] for left in starts[1]])


def _starts(side: int, window: int, stride: int) -> list[int]:
    starts = list(range(0, max(1, side - window + 1), stride))
    if starts[-1] + window < side:
        starts.append(side - window)
    return starts


def covered(mask: np.ndarray, size: tuple[int, int], windows: np.ndarray) -> np.ndarray:
    """Returns the share of every window in which a mask is true, (n,) float64.

    mask: (h, w) bool, of the whole image in fewer pixels.
    size: (height, width) of the image.
    windows: (n, 4), the result of `grid`.
    """
    sums = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    down, across = mask.shape[0] / size[0], mask.shape[1] / size[1]
    top, left, height, width = windows.T
    rows = _pixels_between(top * down, (top + height) * down, mask.shape[0])
    columns = _pixels_between(left * across, (left + width) * across, mask.shape[1])
    (y0, y1), (x0, x1) = rows, columns
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    share: np.ndarray = inside / ((y1 - y0) * (x1 - x0))
    return share


def _pixels_between(begin: np.ndarray, end: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and the last pixel + 1 of every part of a side: one pixel or more."""
    first = np.floor(begin + 1e-9).astype(np.int64).clip(0, side - 1)
    return first, np.maximum(np.ceil(end - 1e-9).astype(np.int64).clip(1, side), first + 1)


def is_scene(tags: Tags) -> bool:
    """True for a TIFF of which rasterio reads windows as the other readers read the whole."""
    plain = tags.photometric in (BLACK_IS_ZERO, RGB, YCBCR) and tags.orientation == 1
    return plain and not (tags.stack or tags.associated or tags.page)


@contextmanager
def _scene(file: str | bytes) -> Iterator[Any]:
    import warnings

    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError as error:
        need = INSTALL.format("geo")
        raise ImportError(f"windows of TIFF files need rasterio: {need}") from error
    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    with opened(file) as content, rasterio.open(content if isinstance(file, bytes) else file) as d:
        yield d


def scene_window(
    file: str | bytes, tags: Tags, part: tuple[int, ...], bands: tuple[int, ...], wanted: int
) -> Pixels:
    """Returns the numbers of a window of a TIFF file, (height, width, C).

    part: top, left, height, width.
    bands: numbers of channels from 1, () for the first channels.
    wanted: number of channels that the encoder takes.
    """
    top, left, height, width = part
    with _scene(file) as scene:
        stop = first_channels(scene.count, tags.channels_read(wanted), tags.alpha)[0]
        if bands and max(bands) > scene.count:
            raise ValueError(f"has {scene.count} channels, data.bands names {max(bands)}")
        indexes = bands or tuple(range(1, stop + 1))
        window = ((top, top + height), (left, left + width))
        values = scene.read(indexes, window=window)
    return oriented(np.moveaxis(values, 0, 2), tags)


def valid_mask(file: str | bytes, tags: Tags) -> np.ndarray | None:
    """Returns where a scene has values, (h, w) bool in fewer pixels, or None: everywhere.

    tags: of the file.
    """
    if tags.nodata is None:
        return None
    scale = max(1, max(tags.height, tags.width) / THUMBNAIL)
    shape = tuple(max(1, round(side / scale)) for side in (tags.height, tags.width))
    with _scene(file) as scene:
        mask: np.ndarray = scene.dataset_mask(out_shape=shape) > 0
        return mask


@contextmanager
def _slide(file: str | bytes) -> Iterator[Any]:
    try:
        from tiffslide import TiffSlide
    except ImportError as error:
        raise ImportError(f"slides need tiffslide: {INSTALL.format('slides')}") from error
    with opened(file) as content:
        given: Any = content if isinstance(file, bytes) else file
        with TiffSlide(given) as slide:
            yield slide


def slide_size(file: str | bytes, level: int) -> tuple[int, int]:
    """Returns (height, width) of a level of a slide, 0 the largest level.

    Raises ValueError if there is no such level.
    """
    with _slide(file) as slide:
        if level >= slide.level_count:
            raise ValueError(f"has {slide.level_count} levels, data.level={level}")
        width, height = slide.level_dimensions[level]
        return int(height), int(width)


def slide_window(file: str | bytes, part: tuple[int, ...], level: int) -> Pixels:
    """Returns a window of a slide, (height, width, 3) uint8. part: top, left, height, width."""
    top, left, height, width = part
    with _slide(file) as slide:
        # The corner is in pixels of the largest level.
        scale = slide.level_downsamples[level]
        corner = (round(left * scale), round(top * scale))
        image = slide.read_region(corner, level, (width, height))
    return Pixels(np.asarray(image.convert("RGB")), 0.0, 255.0)


def tissue_mask(file: str | bytes) -> np.ndarray:
    """Returns where a slide shows tissue, (h, w) bool in fewer pixels."""
    with _slide(file) as slide:
        picture: Image.Image = slide.get_thumbnail((THUMBNAIL, THUMBNAIL)).convert("HSV")
    return np.asarray(picture)[..., 1] > SATURATION
