"""Ranges of values: from the numbers of a file to levels of 8 or 16 bits.

Option `data.range` chooses the range. A file of 8 bits stays as it is, unless the range
states other bounds.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from mocofast.config import ConfigError

# Marks of missing values, in signed or floating numbers without a nodata tag. The largest
# float32, negative, is a mark of ArcGIS.
MISSING = (-9999.0, -32768.0)
HUGE = 1e30
TABLE = 2**16  # number of pixels from which a table of all 16-bit numbers is faster


class Pixels(NamedTuple):
    """The numbers of an image file."""

    values: np.ndarray  # (H, W, C), any type of number
    low: float  # the number that means black, by the file's type of number
    high: float  # the number that means white
    nodata: float | None = None  # the number that marks missing values
    stated: bool = False  # the file states `low` and `high`


class ValueRange(NamedTuple):
    """What `data.range` says."""

    kind: str  # auto, dtype, bounds or percentile
    numbers: tuple[float, ...] = ()  # bounds: (low, high) or a pair per channel. percentile: (a, b)
    depth: int = 8  # bits of a level of three channels, as data.depth

    @property
    def of_type(self) -> bool:
        """True if a file of unsigned numbers keeps the range of its type of number."""
        return self.kind in ("auto", "dtype")


AUTO = ValueRange("auto")
_SYNTAX = re.compile(r"(?:(divide|percentile):)?([^:]+)")


def parse_range(text: str) -> ValueRange:
    """Returns the range of `data.range`. Raises ConfigError for a text without a meaning.

    text: auto, dtype, "min,max", "divide:N" or "percentile:a,b". A pair (or an N) per
        channel is allowed.
    """
    if text in ("auto", "dtype"):
        return ValueRange(text)
    found = _SYNTAX.fullmatch(text)
    try:
        numbers = tuple(float(part) for part in found[2].split(",")) if found else ()
    except ValueError:
        numbers = ()
    kind = found[1] if found else None
    if kind == "divide":
        numbers = tuple(number for last in numbers for number in (0.0, last))
    pairs = list(zip(numbers[::2], numbers[1::2]))
    good = bool(pairs) and len(numbers) % 2 == 0 and all(low < high for low, high in pairs)
    if kind == "percentile":
        good = good and len(pairs) == 1 and numbers[0] >= 0 and numbers[1] <= 100
    if not good:
        raise ConfigError(
            "data.range: expected auto, dtype, min,max (0,4095), divide:N (divide:10000) or "
            f"percentile:a,b (percentile:1,99), got {text!r}"
        )
    return ValueRange("percentile" if kind == "percentile" else "bounds", numbers)


def set_range(source: object, text: str, depth: int = 8) -> None:
    """Sets the range and the depth of a source's files. text: as for `parse_range`."""
    source.value_range = parse_range(text)._replace(depth=depth)  # type: ignore[attr-defined]


def range_of(source: object) -> ValueRange:
    """Returns the range of a source's files: auto for a source that has none."""
    return getattr(source, "value_range", AUTO)


def to_uint8(pixels: Pixels, value_range: ValueRange) -> np.ndarray:
    """Returns `to_levels` of 8 bits."""
    return to_levels(pixels, value_range, np.dtype(np.uint8))


def to_levels(pixels: Pixels, value_range: ValueRange, dtype: np.dtype) -> np.ndarray:
    """Returns (H, W, C): the values scaled from a range to all levels of `dtype`, rounded.

    dtype: uint8 (0..255) or uint16 (0..65535).

    Missing values (NaN, infinity, nodata) become the mean of the present values of their
    channel. Raises ConfigError if the range has pairs for another number of channels.

    auto: the range that the file states (the window of DICOM). 8 and 16 unsigned bits, and
        8 signed bits: the range of the type. Other numbers:
        [0, 1] if all values lie there, else [0, 255] if all values lie there, else the
        lowest and the highest value of the image.
    dtype: the range of the type. Floats: [0, 1].
    percentile: the percentiles of every channel of the image.
    """
    values = pixels.values
    missing = missing_values(pixels)
    bounds = _bounds(pixels, missing, value_range)
    top = np.iinfo(dtype).max
    if values.dtype == dtype and missing is None and set(bounds) == {(0.0, top)}:
        return values
    out = np.empty(values.shape, dtype=dtype)
    for channel, (low, high) in enumerate(bounds):
        plane = values[..., channel]
        if plane.dtype.kind in "iu" and plane.dtype.itemsize <= 2 and plane.size > TABLE:
            # Scale every number of the type once.
            unsigned = np.dtype(f"u{plane.dtype.itemsize}")
            every = np.arange(np.iinfo(unsigned).max + 1).astype(unsigned).view(plane.dtype)
            table = _rounded(_scaled(every, low, high, top)).astype(dtype)
            out[..., channel] = table[plane.view(unsigned)]
        else:
            out[..., channel] = _rounded(_scaled(plane, low, high, top))
        if missing is not None:
            hidden = missing[..., channel]
            if hidden.any():
                shown = _scaled(plane[~hidden], low, high, top)
                out[..., channel][hidden] = _rounded(shown.mean()) if shown.size else 0
    return out


def _scaled(values: np.ndarray, low: float, high: float, top: int) -> np.ndarray:
    """Returns values scaled from [low, high] to [0, top], float64. NaN becomes 0."""
    if high <= low:
        return np.zeros(values.shape)
    # Divide first: 255 / 65535 is no exact number.
    return np.nan_to_num((values.astype(np.float64) - low) / (high - low)).clip(0, 1) * top


def _rounded(values: Any) -> Any:
    """Returns values rounded half up."""
    return np.floor(values + 0.5)


def missing_values(pixels: Pixels) -> np.ndarray | None:
    """Returns (H, W, C) bool, True for missing values, or None if no value is missing."""
    values = pixels.values
    kind = values.dtype.kind
    marks = [] if pixels.nodata is None else [pixels.nodata]
    if kind in "ub" and not marks:
        return None
    missing = np.zeros(values.shape, dtype=bool)
    if kind == "f":
        missing |= ~np.isfinite(values)
        if values.dtype.itemsize > 2:
            missing |= np.abs(values) > HUGE
    if kind == "f" or (kind == "i" and values.dtype.itemsize > 1):
        marks += MISSING
    for mark in marks:
        missing |= values == mark
    return missing if missing.any() else None


def _bounds(
    pixels: Pixels, missing: np.ndarray | None, value_range: ValueRange
) -> list[tuple[float, float]]:
    """Returns the lowest and the highest number of every channel, [(low, high)].

    missing: (H, W, C) bool, True for missing values, or None.
    """
    values, kind = pixels.values, value_range.kind
    channels = values.shape[2]
    if kind == "bounds":
        pairs = list(zip(value_range.numbers[::2], value_range.numbers[1::2]))
        if len(pairs) not in (1, channels):
            raise ConfigError(
                f"data.range: got ranges for {len(pairs)} channels, but the image has {channels}"
            )
        return pairs * channels if len(pairs) == 1 else pairs
    if kind == "dtype" or (kind == "auto" and (pixels.stated or has_own_range(values.dtype))):
        return [(pixels.low, pixels.high)] * channels
    if kind == "percentile":
        return [
            _percentiles(present(pixels, missing, channel), value_range.numbers)
            for channel in range(channels)
        ]
    seen = values if missing is None else values[~missing]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
    if low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 and values.dtype.kind == "f" else 255.0
    return [(low, high)] * channels


def present(pixels: Pixels, missing: np.ndarray | None, channel: int) -> np.ndarray:
    """Returns the values of a channel that are not missing, (n,).

    missing: (H, W, C) bool, True for missing values, or None.
    """
    plane = pixels.values[..., channel]
    return plane.ravel() if missing is None else plane[~missing[..., channel]]


def _percentiles(values: np.ndarray, numbers: tuple[float, ...]) -> tuple[float, float]:
    if not values.size:
        return 0.0, 0.0
    low, high = np.percentile(values, numbers)
    return float(low), float(high)


def has_own_range(dtype: np.dtype) -> bool:
    """True for types of numbers whose whole range is in use: 8 bits and 16 unsigned bits."""
    return (dtype.kind in "bu" and dtype.itemsize <= 2) or dtype == np.int8


def type_bounds(dtype: np.dtype) -> tuple[float, float]:
    """Returns the lowest and the highest number of a type. Floats: 0 and 1."""
    if dtype.kind in "fb":
        return 0.0, 1.0
    limits = np.iinfo(dtype)
    return float(limits.min), float(limits.max)
