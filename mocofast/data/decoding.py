"""Image files: opens and decodes them with PIL, reads their sizes, and finds the files
that do not decode.

Every function takes a file as its path or as its content. EXIF orientation is never applied.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np
from PIL import Image

# An entry of warnings.filters: action, message, category, module, line number.
_NO_PIL_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


@contextmanager
def open_image(file: str | bytes) -> Iterator[Image.Image]:
    """Opens an image file with PIL. PIL's warnings are ignored until the `with` block ends.

    PIL warns of many pixels, of odd EXIF data and of palettes with transparency. The
    loaders can use such images. Raises what PIL.Image.open raises.
    """
    # The entry is inserted and removed here, because warnings.catch_warnings is not for
    # threads: it restores the filters of the whole process, also those that another thread
    # has set meanwhile. Every thread adds an entry of its own. If catch_warnings elsewhere
    # replaces the list in between, the entry may be gone already.
    filters = cast("list[Any]", warnings.filters)
    filters.insert(0, _NO_PIL_WARNINGS)
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            yield image
    finally:
        with suppress(ValueError):
            cast("list[Any]", warnings.filters).remove(_NO_PIL_WARNINGS)


def image_size(file: str | bytes) -> tuple[int, int]:
    """Returns (height, width) from the header of an image file. Decodes no pixels.

    Raises OSError (PIL.UnidentifiedImageError is an OSError) or another exception of
    PIL where the header cannot be read, and PIL.Image.DecompressionBombError above
    twice PIL.Image.MAX_IMAGE_PIXELS.
    """
    with open_image(file) as image:
        return image.height, image.width


def decode(item: str | bytes | np.ndarray) -> Image.Image:
    """Returns an RGB image.

    item: the path of a file, the content of a file, or pixels (H, W, 3) uint8.

    Transparency is dropped: the colour under transparent pixels shows. 16-bit grey is
    scaled to 8 bits, because PIL's own conversion would clip it. Of an animation the
    first frame is taken. Raises what PIL raises on a bad file, which is nearly any
    exception.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    with open_image(item) as image:
        image.load()
        if image.mode.startswith("I"):  # 16 bits: "I;16" from PNG and TIFF, "I" from PGM
            wide = np.asarray(image).astype(np.int64).clip(0, 65535)
            return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
