"""Image files: opens and decodes them with PIL, reads their sizes, and finds the files
that do not decode.

Every function takes a file as its path or as its content. EXIF orientation is never applied.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from mocofast.errors import describe_error

PROBED_AT_ONCE = 64  # number of decoded images that `undecodable` holds in memory

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


def undecodable(files: Sequence[str | bytes], sizes: np.ndarray) -> dict[int, str]:
    """Finds the files that cannot be decoded to the size in their header. Decodes every file.

    files: n paths or contents.
    sizes: (n, 2) integers, height and width as `image_size` returned them.

    Returns {position in `files`: reason}. Decodes with nvImageCodec, which DALI uses,
    or with PIL where nvImageCodec is not installed.
    """
    try:
        check = _nvimgcodec_check()
    except ImportError:
        check = _pil_check
    bad: dict[int, str] = {}
    for start in range(0, len(files), PROBED_AT_ONCE):
        part = slice(start, start + PROBED_AT_ONCE)
        for position, size in enumerate(check(files[part]), start):
            reason = size if isinstance(size, str) else unlike_header(size, sizes[position])
            if reason:
                bad[position] = reason
    return bad


def unlike_header(size: tuple[int, int], stated: np.ndarray) -> str:
    """Returns why an image is bad if its size differs from the size in its header,
    otherwise "".

    size: (height, width) of the decoded image.
    stated: (2,) integers, height and width in the header.
    """
    header = tuple(stated.tolist())
    return "" if size == header else f"decodes to {size}, but its header states {header}"


# A function that decodes files. Returns (height, width) of every file, or the reason why
# it does not decode.
Check = Callable[[Sequence[str | bytes]], "list[tuple[int, int] | str]"]


def _nvimgcodec_check() -> Check:
    """Returns a check with nvImageCodec on the CPU. Raises ImportError if nvImageCodec
    is missing.
    """
    from nvidia import nvimgcodec

    cpu = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
    no_gpu = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY
    decoder = nvimgcodec.Decoder(device_id=no_gpu, backends=[cpu])
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def check(files: Sequence[str | bytes]) -> list[tuple[int, int] | str]:
        found: list[tuple[int, int] | str] = [""] * len(files)
        streams = {}
        for position, file in enumerate(files):
            try:
                content = file if isinstance(file, bytes) else Path(file).read_bytes()
                streams[position] = nvimgcodec.CodeStream(content)
            # OSError where the file cannot be read, RuntimeError for a format unknown to
            # nvImageCodec.
            except Exception as error:
                found[position] = describe_error(error)
        for position, image in zip(streams, decoder.decode(list(streams.values()), params=params)):
            if image is not None:
                found[position] = (image.height, image.width)
            else:
                # nvImageCodec gives no reason. PIL mostly does.
                reason = _pil_check([files[position]])[0]
                unknown = "nvImageCodec cannot decode it"
                found[position] = reason if isinstance(reason, str) else unknown
        return found

    return check


def _pil_check(files: Sequence[str | bytes]) -> list[tuple[int, int] | str]:
    """A check with PIL."""
    found: list[tuple[int, int] | str] = []
    for file in files:
        try:
            with open_image(file) as image:
                image.load()
                found.append((image.height, image.width))
        except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
            found.append(describe_error(error))
    return found
