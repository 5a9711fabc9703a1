"""Decodes JPEG files at a half, a quarter or an eighth of their size (`data.decode=scaled`).

libjpeg leaves out the high frequencies of every block of 8 x 8 pixels, so less is computed for
every pixel. How far a file is scaled down follows from its size and the crops of its views, so
every loader decodes a file of a step alike, and a resumed run continues exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from mocofast.config import AugmentConfig, ConfigError
from mocofast.data.decoding import open_image
from mocofast.data.interface import ViewParams

FACTORS = (8, 4, 2)  # of libjpeg's decoder
SCALABLE = ("JPEG", "MPO")  # PIL's names of the formats. All others are decoded in full


def scaled_factor(params: Sequence[ViewParams], augments: Sequence[AugmentConfig]) -> int:
    """Returns 8, 4, 2 or 1: the largest factor by which an image may be scaled down.

    params: of every view of the image, before scaling.
    augments: of every view. A scaled crop has at least the pixels of the view along both sides.
    """
    for factor in FACTORS:
        if all(
            p.height >= factor * augment.shape[0] and p.width >= factor * augment.shape[1]
            for p, augment in zip(params, augments)
        ):
            return factor
    return 1


def scaled_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Returns (height, width) of an image that is decoded at 1 / factor, as libjpeg rounds."""
    height, width = size
    return -(-height // factor), -(-width // factor)


def scaled_params(params: ViewParams, size: tuple[int, int], factor: int) -> ViewParams:
    """Returns the parameters of a view with the crop in pixels of the scaled image.

    size: (height, width) of the full image.

    The box is rounded to whole pixels, so a crop moves by at most a pixel of the view.
    """
    if factor == 1:
        return params
    full = scaled_size(size, factor)
    height, width = (round(side / factor) for side in (params.height, params.width))
    top = min(round(params.top / factor), full[0] - height)
    left = min(round(params.left / factor), full[1] - width)
    return params._replace(top=top, left=left, height=height, width=width)


def decode_scaled(
    file: str | bytes, choose: Callable[[tuple[int, int]], int]
) -> tuple[Image.Image, tuple[int, int], int] | None:
    """Decodes a JPEG file scaled down. Returns None for files of other formats.

    choose: returns the factor, given (height, width) of the full image.

    Returns the RGB image, (height, width) of the full image, and the factor.
    Raises what PIL raises on a bad file, which is nearly any exception.
    """
    with open_image(file) as image:
        if image.format not in SCALABLE:
            return None
        size = image.height, image.width
        factor = choose(size)
        if factor > 1:
            # PIL takes the largest factor that leaves at least the size asked for.
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        if (image.height, image.width) != scaled_size(size, factor):
            raise OSError(f"a JPEG file of {size} decodes to {(image.height, image.width)}")
        return image.convert("RGB"), size, factor


def check_scaled(loader: str, on_gpu: bool, is_rgb: bool, of_type: bool) -> None:
    """Raises ConfigError where a loader cannot decode with `data.decode=scaled`.

    loader: "device", "dali" or "torchvision".
    on_gpu: the views are made on a GPU.
    is_rgb: the images are 8-bit RGB.
    of_type: data.range keeps the numbers of 8-bit files.
    """
    way_out = "--data.decode full"
    if not is_rgb or not of_type:
        why = "only 8-bit RGB with data.range=auto or dtype is decoded scaled"
    elif loader == "device":
        why = "the device loader decodes every image once, before the crops are known"
        way_out += ", or --data.loader torchvision"
    elif loader == "dali" and on_gpu:
        why = "DALI decodes on the GPU, in full"
        way_out += ", or --data.loader torchvision"
    else:
        return
    raise ConfigError(f"data.decode=scaled: {why}; {way_out}")
