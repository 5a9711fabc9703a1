"""What the DALI loader must know of image files beside their pixels: their size, and whether they decode."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PROBED_AT_ONCE = 64  # decoded images held in memory by `undecodable`


def image_size(file: str | bytes) -> tuple[int, int]:
    """(height, width) from the header of an image file (its path, or its content), EXIF orientation not applied.

    Raises OSError (also PIL.UnidentifiedImageError) or another exception of PIL's where there is no readable
    header, and PIL.Image.DecompressionBombError above twice PIL.Image.MAX_IMAGE_PIXELS.
    """
    with Image.open(open_image(file)) as image:
        return image.height, image.width


def open_image(file: str | bytes) -> str | io.BytesIO:
    """What PIL.Image.open takes."""
    return io.BytesIO(file) if isinstance(file, bytes) else file


def undecodable(files: Sequence[str | bytes], sizes: np.ndarray) -> dict[int, str]:
    """Which files cannot be decoded to the size their header states: position in `files` -> why.

    files: n paths or contents; sizes: (n, 2), what `image_size` said.
    Decodes every file: with nvImageCodec, which is what DALI decodes with, or PIL where that is not installed.
    """
    try:
        check = _nvimgcodec_check()
    except ImportError:
        check = _pil_check
    bad: dict[int, str] = {}
    for start in range(0, len(files), PROBED_AT_ONCE):
        part = slice(start, start + PROBED_AT_ONCE)
        for position, size in enumerate(check(files[part]), start):
            if isinstance(size, str):
                bad[position] = size
            elif why := unlike_header(size, sizes[position]):
                bad[position] = why
    return bad


def unlike_header(size: tuple[int, int], stated: np.ndarray) -> str:
    """Why an image of this size is bad: its header states another; "" where it does not. Both (height, width)."""
    header = tuple(stated.tolist())
    return "" if size == header else f"decodes to {size}, but its header states {header}"


Check = Callable[
    [Sequence[str | bytes]], "list[tuple[int, int] | str]"
]  # for each file (height, width), or why not


def _nvimgcodec_check() -> Check:
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
            # OSError where it cannot be read, RuntimeError where nvImageCodec knows no such format.
            except Exception as error:
                found[position] = f"{type(error).__name__}: {error}"
        for position, image in zip(streams, decoder.decode(list(streams.values()), params=params)):
            if image is None:  # nvImageCodec has no words for it, PIL mostly has
                reason = _pil_check([files[position]])[0]
                found[position] = (
                    reason if isinstance(reason, str) else "nvImageCodec cannot decode it"
                )
            else:
                found[position] = (image.height, image.width)
        return found

    return check


def _pil_check(files: Sequence[str | bytes]) -> list[tuple[int, int] | str]:
    found: list[tuple[int, int] | str] = []
    for file in files:
        try:
            with Image.open(open_image(file)) as image:
                image.load()
                found.append((image.height, image.width))
        except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
            found.append(f"{type(error).__name__}: {error}")
    return found


def decode(item: str | bytes | np.ndarray) -> Image.Image:
    """A file (path or content) or (H, W, 3) uint8 pixels as an RGB image; raises whatever PIL raises on a bad file.

    EXIF orientation is not applied. Transparency is dropped: the colour stored under it shows. 16-bit grey is
    scaled to 8 bits (PIL's own conversion would clip it), the first frame of an animation is taken.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    with Image.open(open_image(item)) as image:
        image.load()
        if image.mode.startswith("I"):  # 16 bits; "I;16" from PNG and TIFF, "I" from PGM
            wide = np.asarray(image).astype(np.int64).clip(0, 65535)
            return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def describe(error: Exception) -> str:
    """Why a file is bad, for the list of skipped ones."""
    return f"{type(error).__name__}: {error}"
