"""What the DALI loader must know of image files beside their pixels: their size, and whether they decode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
from PIL import Image

# Start-of-frame markers of JPEG (ITU-T T.81, table B.1); C4, C8 and CC lie between them but mean other things.
SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROBED_AT_ONCE = 64  # decoded images held in memory by `undecodable`


def image_size(path: str) -> tuple[int, int]:
    """(height, width) from the header of an image file, EXIF orientation not applied.

    Raises OSError (also PIL.UnidentifiedImageError) or another exception of PIL's where there is no readable
    header, and PIL.Image.DecompressionBombError above twice PIL.Image.MAX_IMAGE_PIXELS.
    """
    with open(path, "rb") as file:
        size = _jpeg_size(file)
        if size is None:  # another format, or an odd JPEG
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about large images, palettes and EXIF; none matters here
                with Image.open(file) as image:
                    size = (image.height, image.width)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > 2 * limit:
        raise Image.DecompressionBombError(f"{size[1]} x {size[0]} pixels, of at most {2 * limit}")
    return size


def _jpeg_size(file: IO[bytes]) -> tuple[int, int] | None:
    """Walks the segments of a JPEG file to its frame header: a tenth of the time that PIL takes for it."""
    if file.read(2) != b"\xff\xd8":
        return None
    while True:
        head = file.read(9)  # marker, length, and if it is a frame header: precision, height, width
        if len(head) < 9 or head[0] != 0xFF or head[1] == 0xFF:
            return None
        if head[1] in SOF:
            height, width = int.from_bytes(head[5:7], "big"), int.from_bytes(head[7:9], "big")
            return (height, width) if height and width else None
        length = int.from_bytes(head[2:4], "big")
        file.seek(length - 7, 1)


def undecodable(paths: Sequence[str], sizes: np.ndarray) -> dict[int, str]:
    """Which files cannot be decoded to the size their header states: position in `paths` -> why.

    paths: n files; sizes: (n, 2), what `image_size` said.
    Decodes every file: with nvImageCodec, which is what DALI decodes with, or PIL where that is not installed.
    """
    try:
        check = _nvimgcodec_check()
    except ImportError:
        check = _pil_check
    bad: dict[int, str] = {}
    for start in range(0, len(paths), PROBED_AT_ONCE):
        part = slice(start, start + PROBED_AT_ONCE)
        for position, size in enumerate(check(paths[part]), start):
            stated = (int(sizes[position][0]), int(sizes[position][1]))
            if isinstance(size, str):
                bad[position] = size
            elif size != stated:
                bad[position] = f"decodes to {size}, but its header states {stated}"
    return bad


Check = Callable[[Sequence[str]], "list[tuple[int, int] | str]"]  # for each file (height, width), or why not


def _nvimgcodec_check() -> Check:
    from nvidia import nvimgcodec

    cpu = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
    no_gpu = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY
    decoder = nvimgcodec.Decoder(device_id=no_gpu, backends=[cpu])
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def check(paths: Sequence[str]) -> list[tuple[int, int] | str]:
        found: list[tuple[int, int] | str] = [""] * len(paths)
        streams = {}
        for position, path in enumerate(paths):
            try:
                with open(path, "rb") as file:
                    streams[position] = nvimgcodec.CodeStream(file.read())
            # OSError where it cannot be read, RuntimeError where nvImageCodec knows no such format.
            except Exception as error:
                found[position] = f"{type(error).__name__}: {error}"
        for position, image in zip(streams, decoder.decode(list(streams.values()), params=params)):
            if image is None:  # nvImageCodec has no words for it, PIL mostly has
                reason = _pil_check([paths[position]])[0]
                found[position] = reason if isinstance(reason, str) else "nvImageCodec cannot decode it"
            else:
                found[position] = (image.height, image.width)
        return found

    return check


def _pil_check(paths: Sequence[str]) -> list[tuple[int, int] | str]:
    found: list[tuple[int, int] | str] = []
    for path in paths:
        try:
            with warnings.catch_warnings(), Image.open(path) as image:
                warnings.simplefilter("ignore")
                image.load()
                found.append((image.height, image.width))
        except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
            found.append(f"{type(error).__name__}: {error}")
    return found
