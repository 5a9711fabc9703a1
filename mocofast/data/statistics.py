"""Measures channel means, deviations and ranges of a set of images: see `StatsConfig`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from mocofast.config import ConfigError, DataConfig
from mocofast.data.arrays import PixelFormat, read_numbers
from mocofast.data.deadline import in_time
from mocofast.data.decoding import decode, read_header
from mocofast.data.finding import counted
from mocofast.data.interface import Source, no_image_decodes, read_seconds
from mocofast.data.loaders import count_workers, pixels_of
from mocofast.data.options import StatsConfig as StatsConfig
from mocofast.data.ranges import (
    Pixels,
    ValueRange,
    missing_values,
    parse_range,
    present,
    type_bounds,
)
from mocofast.data.remarks import Numbers, left_out, numbers_of, suggested_range
from mocofast.data.sources import load_datasets
from mocofast.data.threads import Threads
from mocofast.data_config import reading_values
from mocofast.errors import describe_error, printable

T = TypeVar("T")

SHOWN = 5  # reasons why images are left out, the most frequent first
VALUES = 2000  # numbers of a channel of an image whose percentiles are taken


class Statistics(NamedTuple):
    """What was measured."""

    images: int
    skipped: dict[int, str]  # bad images: {index: reason}
    numbers: list[Numbers]  # of every type of number in the files
    range: str  # the value of `data.range` under which means and deviations were measured
    mean: tuple[float, ...]  # per channel, in [0, 1]
    std: tuple[float, ...]
    remarks: list[str]  # what is not read of the files

    def options(self) -> str:
        """Returns the options for a command line."""
        # Numbers of 16 bits may fill a small part of the range.
        mean, std = (",".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        chosen = "" if self.range == "auto" else f"--data.range {self.range} "
        if len(self.mean) != 3:
            chosen = f"--data.channels {len(self.mean)} {chosen}"
        return f"{chosen}--augment.mean {mean} --augment.std {std}"

    def report(self) -> str:
        """Returns lines for people, and the options."""
        measured = f"{counted(self.images, 'image')} measured, {len(self.skipped):,} left out"
        lines = [measured, *self.remarks]
        reasons = Counter(self.skipped.values()).most_common(SHOWN)
        lines += [f"left out: {counted(n, 'image')}: {printable(reason)}" for reason, n in reasons]
        lines += [f"{n.dtype} numbers from {n.low:.6g} to {n.high:.6g}" for n in self.numbers]
        return "\n".join([*lines, self.options()])


def measure(path: str, options: StatsConfig) -> Statistics:
    """Measures the training images of a set.

    path: as `data.path`.

    The numbers of files are read first, to choose a range under `options.range` "auto".
    Missing numbers count as the mean of their image. Raises ConfigError for unusable
    options, and ValueError if no image can be decoded.
    """
    if options.images < 0:
        raise ConfigError(f"--images: expected at least 0, got {options.images}")
    low, high = options.percentiles
    if any(options.percentiles) and not 0 <= low < high <= 100:
        raise ConfigError(f"--percentiles: expected 0 <= low < high <= 100, got {low},{high}")
    channels = options.channels
    kind = {"source": options.source, "channels": channels, "range": options.range}
    kind |= reading_values(options)
    data = DataConfig(path=path, holdout=0.0, **kind)  # type: ignore[arg-type]
    source = load_datasets(data).train
    count = min(options.images or len(source), len(source))
    indices = [i * len(source) // count for i in range(count)]
    seconds = read_seconds(source)
    with Threads(count_workers(options.workers)) as pool:

        def of_images(work: Callable[..., T], *more: Any) -> Iterator[T | str]:
            return pool.map(
                lambda i: in_time(seconds, work, source, i, *more), indices, 4 * pool.count
            )

        seen: dict[np.dtype, Numbers] = {}
        if options.range == "auto":
            for numbers in of_images(_numbers, channels):
                if isinstance(numbers, Numbers):
                    before = seen.get(numbers.dtype, numbers)
                    seen[numbers.dtype] = before.joined(numbers)
        chosen = _common_range(list(seen.values())) or options.range
        if any(options.percentiles):
            every = of_images(_values, channels)
            values = [found for found in every if isinstance(found, list)]
            chosen = _percentile_range(values, options.percentiles)
        value_range = parse_range(chosen)
        skipped: dict[int, str] = {}
        moments = []
        pixels = pixels_of(source, channels)
        if pixels is not None:
            pixels = pixels._replace(value_range=value_range)
        work = of_images(_moments, value_range, pixels)
        for index, found in zip(indices, tqdm(work, total=count, unit="image", disable=None)):
            if isinstance(found, str):
                skipped[index] = found
            else:
                moments.append(found)
    if not moments:
        raise no_image_decodes(source, {0: next(iter(skipped.values())), **skipped})
    mean, square = np.mean(moments, axis=0)  # (C,) each
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return Statistics(
        len(moments),
        skipped,
        list(seen.values()),
        chosen,
        tuple(mean.tolist()),
        tuple(std.tolist()),
        left_out(source, channels),
    )


def _common_range(numbers: list[Numbers]) -> str:
    """Returns the range for all types of numbers in a set, "" if types need no range or
    contradict one another.
    """
    needed = {suggested_range(n) for n in numbers}
    return needed.pop() if len(needed) == 1 and needed != {"auto"} else ""


def _numbers(source: Source, index: int, channels: int) -> Numbers | None:
    """Returns the numbers of a file, None for a bad file. Files of 8 bits are not decoded."""
    item = source.load(index)
    try:
        if isinstance(item, np.ndarray):
            return Numbers(item.dtype, 0.0, type_bounds(item.dtype)[1], type_bounds(item.dtype)[1])
        if not read_header(item, channels).deep:
            return Numbers(np.dtype(np.uint8), 0.0, 255.0, 255.0)
        return numbers_of(read_numbers(item, channels))
    except Exception:  # `_moments` meets the error again
        return None


def _values(source: Source, index: int, channels: int) -> list[np.ndarray] | None:
    """Returns up to VALUES present numbers of every channel of a file, None for a bad file."""
    try:
        item = source.load(index)
        pixels = (
            Pixels(item, *type_bounds(item.dtype))
            if isinstance(item, np.ndarray)
            else read_numbers(item, channels)
        )
        missing = missing_values(pixels)
    except Exception:  # `_moments` meets the error again
        return None
    every = [present(pixels, missing, channel) for channel in range(pixels.values.shape[2])]
    # Evenly spread over the image, with a step that no side of an image is a multiple of.
    return [v[:: max(1, len(v) // VALUES) | 1].astype(np.float32) for v in every]


def _percentile_range(values: list[list[np.ndarray]], percentiles: tuple[float, float]) -> str:
    """Returns the value of `data.range` from percentiles of all images, a pair per channel."""
    pairs = []
    for channel in zip(*values):
        joined = np.concatenate(channel)
        low, high = np.percentile(joined, percentiles) if joined.size else (0.0, 1.0)
        pairs.append((low, high if high > low else low + 1))
    if all(pair == pairs[0] for pair in pairs):
        pairs = pairs[:1]
    return ",".join(f"{bound:.6g}" for pair in pairs for bound in pair) or "auto"


def _moments(
    source: Source, index: int, value_range: ValueRange, pixels: PixelFormat | None
) -> np.ndarray | str:
    """Returns (2, C) float64, the means of the values and of their squares in [0, 1], or the
    reason why the image is bad.
    """
    try:
        item = source.load(index)
        levels = np.asarray(decode(item, value_range)) if pixels is None else pixels.load(item)
    except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
        return describe_error(error)
    flat = levels.reshape(-1, levels.shape[2]) / np.iinfo(levels.dtype).max
    return np.stack([flat.mean(0), (flat**2).mean(0)])
