"""Colours of TIFF files that the numbers do not show as they are: CMYK, CIELAB, and colours that
were multiplied by their transparency.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

CMYK, LAB, ICC_LAB = 5, 8, 9  # codes of the tag Photometric
CHANNELS = {CMYK: 4, LAB: 3, ICC_LAB: 3}


def to_rgb(values: np.ndarray, photometric: int) -> np.ndarray:
    """Returns RGB, (H, W, 3) uint8, sRGB.

    values: (H, W, C) uint8 or uint16, C at least CHANNELS of the colours.
    photometric: one of CMYK, LAB and ICC_LAB.

    Raises ValueError for other numbers.
    """
    if values.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"CMYK or CIELAB of {values.dtype} is not known")
    mode, deep = "CMYK" if photometric == CMYK else "LAB", values.dtype == np.uint16
    numbers = values[..., : CHANNELS[photometric]].astype(np.float64)
    if photometric == LAB:  # a and b in two's complement
        numbers[..., 1:] = values[..., 1:3].view(np.int16 if deep else np.int8)
        numbers /= (257, 256, 256) if deep else 1
    elif photometric == ICC_LAB:
        numbers = numbers / (256 if deep else 1) - (0, 128, 128)
    else:
        numbers /= 257 if deep else 1
    ends = (0, 255) if photometric == CMYK else ((0, -128, -128), (255, 127, 127))
    # PIL takes a and b in two's complement, too.
    pixels = (np.floor(numbers + 0.5).clip(*ends).astype(np.int16) & 255).astype(np.uint8)
    size = values.shape[1], values.shape[0]
    return np.asarray(Image.frombytes(mode, size, pixels.tobytes()).convert("RGB"))


def divided(values: np.ndarray, extra: tuple[int, ...]) -> np.ndarray:
    """Returns colours that were multiplied by their transparency, divided by it: (H, W, C).

    values: (H, W, C), the colours and then the channels of `extra`.
    extra: kinds of the channels beside the colours, 1 for the transparency. Where it is 0, the
        colours are 0.
    """
    count = values.shape[2] - len(extra)
    colors, rest = values[..., :count], values[..., count:]
    alpha = rest[..., extra.index(1), None].astype(np.float64)
    top = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    shares = np.divide(colors, alpha, out=np.zeros(colors.shape), where=alpha > 0)
    scaled = (shares * top).clip(0, top)
    whole = scaled if values.dtype.kind == "f" else np.floor(scaled + 0.5)
    return np.concatenate([whole.astype(values.dtype), rest], axis=2)
