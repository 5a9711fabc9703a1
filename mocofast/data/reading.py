"""How the files of a set are read, where options say more than the content of the files.

`read_as_asked` wraps a source. The samples of the wrapped source are `items.Item`s, which all
loaders, the evaluation and the commands read alike.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from mocofast.config import ConfigError, DataConfig
from mocofast.data import scenes
from mocofast.data.deadline import in_time
from mocofast.data.decoding import read_header, read_pixels
from mocofast.data.finding import counted
from mocofast.data.interface import Source, epoch_order, read_seconds, source_order
from mocofast.data.items import ALL, WHOLE, Extent, FileReader, Item, native
from mocofast.data.kinds import reader_of
from mocofast.data.names import EXTENSIONS, digest
from mocofast.data.nifti import Nifti
from mocofast.data.ranges import Pixels, range_of, type_bounds
from mocofast.data.threads import Threads
from mocofast.data.tiff import count_pages, read_tags, tiff_pixels
from mocofast.errors import describe_error
from mocofast.plugins import load_function

READERS = 8  # threads that look into the files of a set


class ReaderError(ValueError):
    """A function of `data.reader` raised an error or returned no image, or a file is bad."""


class Reading:
    """How files are read. An `items.Item` calls the methods."""

    def __init__(self, options: DataConfig) -> None:
        """Raises ConfigError if there is no function `options.reader`."""
        self.options, self.channels = options, options.channels
        self.function: Callable[..., Any] | None = None
        if options.reader not in ("auto", "any"):
            self.function = load_function("data.reader", options.reader)

    def extent(self, item: Item, wanted: int) -> Extent:
        """Returns the size of an image. wanted: number of channels that the encoder takes."""
        if len(item.part) == 4:
            return Extent(item.part[2], item.part[3])
        if self.function is not None:
            height, width, _ = (values := self.pixels(item, wanted).values).shape
            return Extent(height, width, values.dtype != np.uint8, "", self.options.reader)
        channels = ALL if self.options.bands else wanted
        if reader := self._reader(item.file):
            return reader.extent(item.file, channels, *item.part)
        found = read_header(item.file, channels)
        remark = "" if item.part else found.remark
        return Extent(found.height, found.width, found.deep, remark, found.format)

    def pixels(self, item: Item, wanted: int) -> Pixels:
        """Returns the numbers of an image, (H, W, C). wanted: as for `extent`."""
        file, part, bands = item.file, item.part, self.options.bands
        channels = ALL if bands else wanted
        if self.function is not None:
            whole = self._call(file)
        elif len(part) == 4 and _is_slide(item.name):
            whole = scenes.slide_window(file, part, self.options.level)
            part = ()
        elif len(part) == 4 and (tags := read_tags(file)) and scenes.is_scene(tags):
            return scenes.scene_window(file, tags, part, bands, wanted)
        elif reader := self._reader(file):
            whole = reader.pixels(file, channels, *part[: len(part) % 4])
        elif len(part) == 1 and (tags := read_tags(file)) and tags.stack:
            whole = tiff_pixels(file, tags, channels, part[0])
        else:
            whole = read_pixels(file, channels)
        if len(part) == 4:
            top, left, height, width = part
            values = whole.values[top : top + height, left : left + width]
            whole = whole._replace(values=values)
        return self._chosen(whole)

    def parts(self, file: str | bytes, name: str) -> np.ndarray:
        """Returns the images that a file gives, (n, 1): numbers of slices, (n, 4): windows, or
        (1, 0): the whole file.

        name: of the file. Raises nearly any exception for a bad file.
        """
        options = self.options
        if options.window:
            return self._windows(file, name)
        reader = self._reader(file)
        every = options.slices == "auto" and isinstance(reader, Nifti)
        if self.function is not None or (options.slices in ("auto", "middle") and not every):
            return np.empty((1, 0), dtype=np.int64)
        if reader is not None:
            count = reader.count(file)
        else:
            tags = read_tags(file)
            channels = ALL if options.bands else self.channels
            count = 1 if tags is None else count_pages(file, tags, channels)
        if count == 1:
            return np.empty((1, 0), dtype=np.int64)
        if every or options.slices == "all":
            return np.arange(count)[:, None]
        numbers = [int(number) if number else None for number in options.slices.split(":")]
        return np.arange(count)[slice(*numbers)][:, None]

    def _windows(self, file: str | bytes, name: str) -> np.ndarray:
        window, cover = self.options.window, self.options.cover
        tags, mask = None, None
        if self.function is None and _is_slide(name):
            size = scenes.slide_size(file, self.options.level)
            mask = scenes.tissue_mask(file) if cover else None
        elif self.function is None and (tags := read_tags(file)) and scenes.is_scene(tags):
            size = tags.height, tags.width
            mask = scenes.valid_mask(file, tags) if cover else None
        else:
            size = self.extent(Item(file, self, (), name), self.channels)[:2]
        windows = scenes.grid(size, window, self.options.stride or window)
        if mask is None:
            return windows
        return windows[scenes.covered(mask, size, windows) >= cover]

    def _reader(self, file: str | bytes) -> FileReader | None:
        """Returns the reader of a file of `kinds`, or None."""
        reader = None if self.function is not None else reader_of(file)
        if isinstance(reader, Nifti) and reader.plane != self.options.plane:
            return Nifti(self.options.plane)
        return reader

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


class _Broken:
    """How a file is read that was found to be bad."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def extent(self, item: Item, wanted: int) -> Extent:
        """Raises ReaderError."""
        raise ReaderError(self.reason)

    def pixels(self, item: Item, wanted: int) -> Pixels:
        """Raises ReaderError."""
        raise ReaderError(self.reason)


class ReadSource:
    """A source whose files are read as options say. `load` returns an `items.Item`.

    A file may give several samples: slices of a volume, or windows of a scene.
    """

    def __init__(self, source: Source, reading: Reading, threads: Threads | None = None) -> None:
        """threads: look into every file for the samples that the file gives. None: one sample a
        file.

        A file that cannot be read gives one sample, which the loader skips and names.
        """
        self.reading = reading
        self._broken: dict[int, str] = {}  # files that cannot be read: {index: reason}
        self._source = source
        self._files = np.arange(len(source))
        self._parts = np.empty((len(source), 0), dtype=np.int64)
        self.value_range = range_of(source)
        self.labels, self.classes = source.labels, source.classes
        if threads is not None:
            found = list(threads.map(self._parts_in_time, range(len(source)), 4 * threads.count))
            self._files = np.repeat(self._files, [len(parts) for parts in found])
            width = max((parts.shape[1] for parts in found), default=0)
            padded = [np.full((len(parts), width), WHOLE) for parts in found]
            for out, parts in zip(padded, found):
                out[:, : parts.shape[1]] = parts
            self._parts = np.concatenate(padded) if padded else self._parts
            self.labels = None if source.labels is None else source.labels[self._files]

    def _parts_in_time(self, index: int) -> np.ndarray:
        found = in_time(read_seconds(self._source), self._parts_of, index)
        if isinstance(found, str):
            self._broken[index] = found
            return np.empty((1, 0), dtype=np.int64)
        return found

    def _parts_of(self, index: int) -> np.ndarray:
        file = self._source.load(index)
        assert isinstance(file, (str, bytes))
        try:
            return self.reading.parts(file, self._source.name(index))
        except Exception as error:  # decoders raise nearly any exception on bad files
            self._broken[index] = describe_error(error)
            return np.empty((1, 0), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def _part(self, index: int) -> tuple[int, ...]:
        part = tuple(self._parts[index].tolist())
        return () if WHOLE in part else part

    def name(self, index: int) -> str:
        """Returns the name of the file, and the place of the sample in the file."""
        name = self._source.name(int(self._files[index]))
        part = self._part(index)
        return f"{name}[{','.join(map(str, part[:2]))}]" if part else name

    def caption(self, index: int) -> str:
        """Returns the caption of the sample's file, of a source with captions."""
        text: str = self._source.caption(int(self._files[index]))  # type: ignore[attr-defined]
        return text

    def load(self, index: int) -> Item:
        """Returns the file with the way to read it. Raises what the source raises."""
        number = int(self._files[index])
        file = self._source.load(number)
        assert isinstance(file, (str, bytes))
        reason = self._broken.get(number)
        reading = self.reading if reason is None else _Broken(reason)
        return Item(file, reading, self._part(index), self._source.name(number))

    def subset(self, index: np.ndarray) -> ReadSource:
        """Returns a source of some samples. index: (n,) int64."""
        part = copy.copy(self)
        part._files, part._parts = self._files[index], self._parts[index]
        part.labels = None if self.labels is None else self.labels[index]
        return part

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the order of an epoch, (N,) integers. The source decides where every file gives
        one sample.
        """
        if np.array_equal(self._files, np.arange(len(self._source))):
            return source_order(self._source, seed, epoch)
        return epoch_order(len(self), seed, epoch)

    def fingerprint(self) -> str:
        """Returns the fingerprint of the source, or a hash with the parts of files."""
        found = self._source.fingerprint()
        if not self._parts.size and len(self) == len(self._source):
            return found
        places = self._files.astype(np.int64).tobytes() + self._parts.tobytes()
        return digest(found.encode() + places, self.labels, self.classes)


def read_as_asked(source: Source, data: DataConfig) -> tuple[Source, list[str]]:
    """Returns a source whose files are read as `data` says, and remarks.

    Returns `source` where the options have no effect. Raises ConfigError for options that
    contradict one another, for images in memory, and if no window is left.
    """
    if data.bands and len(data.bands) != data.channels:
        raise ConfigError(
            f"data.bands: {len(data.bands)} bands for data.channels={data.channels}; "
            f"--data.channels {len(data.bands)} fits"
        )
    asked = [name for name in ("reader", "slices") if getattr(data, name) not in ("auto", "any")]
    asked += [name for name in ("bands", "window") if getattr(data, name)]
    several = bool(data.window) or data.slices not in ("auto", "middle") or _may_be_nifti(source)
    if not len(source) or not (asked or several):
        return source, []
    if isinstance(source.load(0), np.ndarray):
        raise ConfigError(f"data.{asked[0]}: images of data.source={data.source} are no files")
    reading = Reading(data)
    if not several:
        return ReadSource(source, reading), []
    if data.shuffle_window:
        raise ConfigError("data.shuffle_window: expected 0 where a file gives several images")
    with Threads(min(READERS, os.cpu_count() or 1)) as threads:
        read = ReadSource(source, reading, threads)
    what = f"windows of {data.window} pixels" if data.window else "slices or frames"
    count = counted(len(source), "file")
    if not len(read):
        raise ConfigError(
            f"data.window: no window of {count} shows data.cover={data.cover} of tissue or values"
        )
    return read, [f"{count} give {counted(len(read), 'image')}: {what}"]


def _is_slide(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in scenes.SLIDES


def _may_be_nifti(source: Source) -> bool:
    """Returns whether some names end like names of NIfTI files. Shards of photos hold none.

    Of other shards, whose names have no ends, the first sample decides.
    """
    photos = getattr(source, "photos", None)  # of shards alone
    if photos or not len(source) or os.path.splitext(source.name(0))[1].lower() in EXTENSIONS:
        return False
    if photos is False:
        return isinstance(reader_of(cast("bytes", source.load(0))), Nifti)
    return any(
        source.name(index).lower().endswith((".nii", ".nii.gz")) for index in range(len(source))
    )
