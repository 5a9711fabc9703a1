"""How the files of a set are read, where options say more than the content of the files.

`read_as_asked` wraps a source. The samples of the wrapped source are `items.Item`s, which all
loaders, the evaluation and the commands read alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from mocofast.data.decoding import read_header, read_pixels
from mocofast.data.interface import Source, epoch_order, source_order
from mocofast.data.items import ALL, Extent, Item, native
from mocofast.data.ranges import Pixels, range_of, type_bounds
from mocofast.data_config import DataConfig, ReadingOptions
from mocofast.errors import ConfigError, describe_error
from mocofast.plugins import load_function


class ReaderError(ValueError):
    """A function of `data.reader` raised an error, or returned no image."""


class Reading:
    """How files are read. An `items.Item` calls the methods."""

    def __init__(self, options: ReadingOptions) -> None:
        """Raises ConfigError if there is no function `options.reader`."""
        self.options = options
        self.function: Callable[..., Any] | None = None
        if options.reader != "auto":
            self.function = load_function("data.reader", options.reader)

    def extent(self, item: Item, wanted: int) -> Extent:
        """Returns the size of an image. wanted: number of channels that the encoder takes."""
        if self.function is not None:
            height, width, _ = (values := self.pixels(item, wanted).values).shape
            return Extent(height, width, values.dtype != np.uint8, "", self.options.reader)
        found = read_header(item.file, ALL if self.options.bands else wanted)
        return Extent(found.height, found.width, found.deep, found.remark, found.format)

    def pixels(self, item: Item, wanted: int) -> Pixels:
        """Returns the numbers of an image, (H, W, C). wanted: as for `extent`."""
        bands = self.options.bands
        channels = ALL if bands else wanted
        if self.function is not None:
            return self._chosen(self._call(item.file))
        return self._chosen(read_pixels(item.file, channels))

    def _chosen(self, pixels: Pixels) -> Pixels:
        """Returns the channels that `data.bands` names."""
        bands, values = self.options.bands, pixels.values
        if not bands:
            return pixels
        if max(bands) > values.shape[2]:
            raise ValueError(f"has {values.shape[2]} channels, data.bands names {max(bands)}")
        return pixels._replace(values=values[..., [band - 1 for band in bands]])

    def _call(self, file: str | bytes) -> Pixels:
        """Returns what the user's function returns for a file."""
        assert self.function is not None
        name = self.options.reader
        try:
            values = np.asarray(self.function(file))
        except Exception as error:
            raise ReaderError(f"{name} raised {describe_error(error)}") from error
        if values.ndim == 2:
            values = values[..., None]
        if values.ndim != 3 or 0 in values.shape or values.dtype.kind not in "buif":
            raise ReaderError(
                f"{name} returned {values.shape} {values.dtype}, expected numbers (H, W, C)"
            )
        return Pixels(native(values), *type_bounds(values.dtype))


class ReadSource:
    """A source whose files are read as options say. `load` returns an `items.Item`."""

    def __init__(self, source: Source, reading: Reading) -> None:
        self.reading = reading
        self._source = source
        self._files = np.arange(len(source))
        self.value_range = range_of(source)
        self.labels, self.classes = source.labels, source.classes

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Returns the name of the file."""
        return self._source.name(int(self._files[index]))

    def load(self, index: int) -> Item:
        """Returns the file with the way to read it. Raises what the source raises."""
        file = self._source.load(int(self._files[index]))
        assert isinstance(file, (str, bytes))
        return Item(file, self.reading)

    def subset(self, index: np.ndarray) -> ReadSource:
        """Returns a source of some samples. index: (n,) int64."""
        part = copy.copy(self)
        part._files = self._files[index]
        part.labels = None if self.labels is None else self.labels[index]
        return part

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the order of an epoch, (N,) int64, by the source where no sample is left out."""
        if len(self) == len(self._source):
            return source_order(self._source, seed, epoch)
        return epoch_order(len(self), seed, epoch)

    def fingerprint(self) -> str:
        """Returns the fingerprint of the source."""
        return self._source.fingerprint()


def read_as_asked(source: Source, data: DataConfig) -> Source:
    """Returns a source whose files are read as `data` says.

    Returns `source` where the options have no effect. Raises ConfigError for bands that do not
    fit the channels, and for images in memory.
    """
    if data.bands and len(data.bands) != data.channels:
        raise ConfigError(
            f"data.bands: {len(data.bands)} bands for data.channels={data.channels}; "
            f"--data.channels {len(data.bands)} fits"
        )
    if (data.reader == "auto" and not data.bands) or not len(source):
        return source
    if isinstance(source.load(0), np.ndarray):
        option = "data.reader" if data.reader != "auto" else "data.bands"
        raise ConfigError(f"{option}: images of data.source={data.source} are no files")
    return ReadSource(source, Reading(data))
