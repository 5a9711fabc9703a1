"""Files as nvImageCodec sees them, which DALI uses: whether a header is accepted, and which
files do not decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mocofast.data.decoding import File, Header, decode, open_image
from mocofast.data.items import content_of
from mocofast.data.ranges import ValueRange
from mocofast.errors import describe_error

# PIL's names of the formats that DALI decodes, and nvImageCodec's names.
FORMATS = {
    "JPEG": "jpeg",
    "MPO": "jpeg",
    "PNG": "png",
    "BMP": "bmp",
    "WEBP": "webp",
    "TIFF": "tiff",
    "PPM": "pnm",
}
PROBED_AT_ONCE = 64  # number of decoded images that `undecodable` holds in memory


def accepts(file: File, header: Header) -> bool:
    """True for a file that DALI may decode: the kind is plain, and nvImageCodec reads the
    same header as PIL.

    header: as PIL reads it.

    A damaged file, or a file of a format that is not DALI's own, can end the process inside
    a decoder. Reads no pixels. False for every file where nvImageCodec is not installed.
    """
    if not header.plain or header.format not in FORMATS:
        return False
    try:
        from nvidia import nvimgcodec

        # Every attribute reads the header: RuntimeError where nvImageCodec cannot.
        stream = nvimgcodec.CodeStream(file)
        codec, size, precision = stream.codec_name, (stream.height, stream.width), stream.precision
    except Exception:  # RuntimeError for a format unknown to nvImageCodec, ImportError
        return False
    bits = (8,) if header.format in ("JPEG", "MPO") else (1, 2, 4, 8, 16)
    return (
        codec == FORMATS[header.format]
        and size == (header.height, header.width)
        and precision in bits
    )


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


def decode_to_ppm(file: File, value_range: ValueRange, stated: np.ndarray) -> np.ndarray | str:
    """Decodes a file in Python. Returns the content of a PPM file as uint8, which DALI
    decodes without loss, or why the file is bad.

    value_range: the numbers that mean black and white.
    stated: (2,) integers, height and width in the header.

    Raises what `decoding.decode` raises.
    """
    pixels = np.asarray(decode(file, value_range))
    return unlike_header(pixels.shape[:2], stated) or to_ppm(pixels)


def to_ppm(pixels: np.ndarray) -> np.ndarray:
    """Returns the content of a PPM file as uint8. pixels: (H, W, 3) uint8."""
    height, width, _ = pixels.shape
    head = np.frombuffer(f"P6\n{width} {height}\n255\n".encode(), dtype=np.uint8)
    return np.concatenate([head, pixels.ravel()])


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
                streams[position] = nvimgcodec.CodeStream(content_of(file))
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
