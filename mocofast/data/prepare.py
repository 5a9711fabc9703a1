"""Writes a compact copy of a folder of images, as tar shards: see `PrepareConfig`."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mocofast import files
from mocofast.config import ConfigError, DataConfig
from mocofast.data.deadline import in_time
from mocofast.data.decoding import File, decode, read_header
from mocofast.data.interface import Source, epoch_order, read_seconds
from mocofast.data.items import opened
from mocofast.data.loaders import count_workers
from mocofast.data.options import PrepareConfig as PrepareConfig
from mocofast.data.packed import PackedSource
from mocofast.data.ranges import AUTO, ValueRange, range_of
from mocofast.data.remarks import left_out
from mocofast.data.shard_index import local_index
from mocofast.data.shard_table import META
from mocofast.data.sources import load_datasets
from mocofast.data.threads import Threads
from mocofast.data_config import reading_values
from mocofast.errors import UnreachableError, describe_error

AHEAD = 4  # images per thread that are prepared ahead of the writer
STORED = "mocofast prepare stores RGB of 8 bits"

# The extensions of formats that are copied unchanged.
_EXTENSION = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "BMP": ".bmp",
    "WEBP": ".webp",
    "PPM": ".ppm",
    "TIFF": ".tif",
    "JPEG2000": ".jp2",
}


def prepare(source: str, out: str, options: PrepareConfig) -> dict[str, Any]:
    """Writes a compact copy of the folder `source` to a new folder `out`. Returns the
    content of META.

    Images with a short side above `options.size` are shrunk to `options.size` (Lanczos)
    and stored as JPEG, 4:4:4, without metadata. Other images are copied unchanged, or as
    PNG of 8 bits where `options.range` or the kind of file changes the numbers. EXIF
    orientation is not applied: loaders do not apply it either. Labels, train/ and val/
    are found as for data.source=folder. Samples are written in a random order that is
    the same for every call, so a few shards are a fair selection. Files that cannot be
    decoded are left out and named in META under "skipped".

    Writes to `out`.partial, which is renamed at the end, and removed after an error.
    Raises ConfigError for unusable options, a source without images, or an `out` that exists.
    """
    _check(options)
    target = Path(out).expanduser()
    files.require_writable(target.parent, "out")
    partial = target.with_name(f"{target.name}.partial")
    for path, remark in (
        (target, "is there already"),
        (partial, "is there: another run's, or left by a killed one"),
    ):
        if path.exists():
            raise ConfigError(f"{str(path)!r} {remark}; nothing is overwritten")
    data = DataConfig(path=source, holdout=0.0, range=options.range, **reading_values(options))
    datasets = load_datasets(data)
    parts: dict[str, Source] = {"": datasets.train}  # {folder: images}
    if datasets.val is not None:
        parts = {part.name(0).partition("/")[0]: part for part in (datasets.train, datasets.val)}
        # In a wrapper folder, or in tables.
        if len(parts) == 1 or isinstance(datasets.train, PackedSource):
            parts = {"train": datasets.train, "val": datasets.val}
    meta: dict[str, Any] = {
        "size": options.size,
        "quality": options.quality,
        "range": options.range,
        "classes": datasets.train.classes,
        "images": {},
        "skipped": {},
        "remarks": [*datasets.remarks, *(f"{line}; {STORED}" for line in left_out(datasets.train))],
    }
    partial.mkdir(parents=True)
    try:
        with (
            tqdm(total=sum(map(len, parts.values())), unit="image", disable=None) as bar,
            Threads(count_workers(options.workers)) as pool,
        ):
            for part, images in parts.items():
                stored, skipped = _write(images, partial / part, part, options, pool, bar)
                meta["images"][part or "all"] = stored
                meta["skipped"] |= skipped
        (partial / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return meta


def _check(options: PrepareConfig) -> None:
    for name, holds, expected in (
        ("size", options.size >= 1, "at least 1"),
        ("quality", 1 <= options.quality <= 100, "1 to 100"),
        ("shard-mb", options.shard_mb >= 1, "at least 1"),
    ):
        if not holds:
            value = getattr(options, name.replace("-", "_"))
            raise ConfigError(f"--{name}: expected {expected}, got {value}")


def compact(
    file: File, size: int, quality: int, value_range: ValueRange = AUTO
) -> tuple[str, bytes]:
    """Returns (extension, content) of the stored image. Raises PIL's exceptions for a bad file.

    file: the original image file.
    size, quality: as in PrepareConfig.
    value_range: the numbers that mean black and white.
    """
    content = file
    if isinstance(file, str):
        with opened(file) as whole:
            content = whole.read()
    image = decode(content, value_range)
    short = min(image.size)
    buffer = io.BytesIO()
    if short <= size:
        header = read_header(content)
        if value_range.of_type and header.plain and isinstance(content, bytes):
            if not isinstance(file, str):
                return _EXTENSION[header.format], content
            return Path(file).suffix.lower(), content
        image.save(buffer, "PNG")
        return ".png", buffer.getvalue()
    width, height = (round(side * size / short) for side in image.size)
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=quality, subsampling="4:4:4"
    )
    return ".jpg", buffer.getvalue()


def _write(
    source: Source, folder: Path, part: str, options: PrepareConfig, pool: Threads, bar: tqdm[Any]
) -> tuple[int, dict[str, str]]:
    """Writes the shards of one folder.

    source, part: the images, and their folder ("" for the root).
    folder: where the shards go.

    Returns the number of images written, and the bad files as {name: reason}.
    """

    seconds = read_seconds(source)

    def made(index: int) -> tuple[str, bytes]:
        file = source.load(index)
        assert not isinstance(file, np.ndarray)
        return compact(file, options.size, options.quality, range_of(source))

    def work(index: int) -> tuple[str, bytes] | str:
        try:
            return in_time(seconds, made, index)
        except UnreachableError:
            raise
        except Exception as error:  # PIL's decoders raise nearly any exception on corrupt files
            return describe_error(error)

    folder.mkdir(exist_ok=True)
    skipped: dict[str, str] = {}
    keys: set[str] = set()
    order = epoch_order(len(source), 0, 0).tolist()
    with _Shards(folder, options.shard_mb * 10**6) as shards:
        for index, item in zip(order, pool.map(work, order, AHEAD * pool.count)):
            bar.update()
            if isinstance(item, str):
                skipped[source.name(index)] = item
                continue
            extension, content = item
            # A key ends at the first dot. Names that differ only by a dot or an extension
            # get a number.
            name = source.name(index).removeprefix(f"{part}/" if part else "")
            stem = name.rpartition(".")[0]
            if isinstance(source, PackedSource):  # the names are FILE:ROW PATH
                stem = os.path.splitext(name.replace(":", "/").replace(" ", "/"))[0]
            key = stem.replace(".", "_")
            if key in keys:
                key = f"{key}-{index}"
            keys.add(key)
            members = {f"{key}{extension}": content}
            if source.labels is not None and source.labels[index] >= 0:
                members[f"{key}.cls"] = str(source.labels[index]).encode()
            shards.add(members)
    if not keys:
        raise ConfigError(
            f"none of the {len(source)} images can be decoded; {next(iter(skipped.items()))}"
        )
    return len(keys), skipped


class _Shards:
    """Writes shard-000000.tar, shard-000001.tar, ..., and the index of every finished shard.

    A context manager. After an error in the block, the unfinished shard gets no index.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes after which a shard ends."""
        self._folder, self._limit = folder, limit
        self._tar: tarfile.TarFile | None = None
        self._path, self._count = folder, 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        if error is None:
            self._end()
        elif self._tar is not None:
            self._tar.close()

    def add(self, members: dict[str, bytes]) -> None:
        """Writes the members of one sample, {name: content}, to one shard."""
        if self._tar is not None and self._tar.offset >= self._limit:
            self._end()
        if self._tar is None:
            self._path = self._folder / f"shard-{self._count:06}.tar"
            self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
            self._count += 1
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
        self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers

    def _end(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            local_index(self._path)
