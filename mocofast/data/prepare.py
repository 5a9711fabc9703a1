"""`mocofast prepare`: a compact copy of a folder of images, as tar shards that are smaller and faster to decode.

Measured on 125 photos (short side 375 pixels in the median; two random crops of 20 to 100% of each, at 224 pixels)
with the defaults: half the bytes, half the decoding time, a fifth less CPU time in the whole DALI loader; views
differ from the originals' by 2.6 of 255 on average (PSNR 37.6 dB), since crops that were shrunk to 224 pixels are now
enlarged. With --size 384: .7 (48 dB), at .83 of the decoding time. What it does to a trained encoder was not
measured.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mocofast.config import ConfigError, DataConfig, option
from mocofast.data.decoding import decode
from mocofast.data.interface import Source, epoch_order
from mocofast.data.loaders import count_workers
from mocofast.data.shards import META, local_index
from mocofast.data.sources import load_datasets
from mocofast.data.threads import Threads
from mocofast.errors import describe_error

AHEAD = 4  # images per thread in the making beside the one that is stored


@dataclass(frozen=True)
class PrepareConfig:
    """How images are stored."""

    size: int = option(256, "short side that larger images are shrunk to, in pixels")
    quality: int = option(95, "JPEG quality of those, 1 to 100")
    shard_mb: int = option(1024, "size at which the next shard begins, in MB")
    workers: int = option(-1, "threads; -1 takes the cores there are")


def prepare(source: str, out: str, options: PrepareConfig) -> dict[str, Any]:
    """Writes the images of the folder `source` into a new folder `out`, and returns what its META file holds.

    Images whose short side is above `options.size` are shrunk to it (Lanczos) and stored as JPEG, 4:4:4, without
    metadata; others are copied as they are. EXIF orientation is not applied, as loaders do not either. Labels, train/
    and val/ are those that data.source=folder would find. Samples are written in a random order, the same each time,
    so that a few shards are a fair sample. Files that cannot be decoded are left out and named under "skipped".

    All happens in `out`.partial, which gets its name at the end and is removed after an error.
    Raises ConfigError for unusable options, a source without images, or an `out` that exists.
    """
    for name, holds, expected in (
        ("size", options.size >= 1, "at least 1"),
        ("quality", 1 <= options.quality <= 100, "1 to 100"),
        ("shard-mb", options.shard_mb >= 1, "at least 1"),
    ):
        if not holds:
            raise ConfigError(
                f"--{name}: expected {expected}, got {getattr(options, name.replace('-', '_'))}"
            )
    target = Path(out).expanduser()
    partial = target.with_name(f"{target.name}.partial")
    for path, remark in (
        (target, "is there already"),
        (partial, "is there: another run's, or left by a killed one"),
    ):
        if path.exists():
            raise ConfigError(f"{str(path)!r} {remark}; nothing is overwritten")
    datasets = load_datasets(DataConfig(path=source, holdout=0.0))
    parts: dict[str, Source] = {"": datasets.train}
    if datasets.val is not None:
        parts = {split.name(0).partition("/")[0]: split for split in (datasets.train, datasets.val)}
    partial.mkdir(parents=True)
    try:
        meta: dict[str, Any] = {
            "size": options.size,
            "quality": options.quality,
            "classes": datasets.train.classes,
        }
        meta |= {"images": {}, "skipped": {}}
        total = sum(map(len, parts.values()))
        with (
            tqdm(total=total, unit="image", disable=None) as bar,
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


def compact(path: str, size: int, quality: int) -> tuple[str, bytes]:
    """(extension, content) of what is stored for an image file. Raises what PIL raises on one it cannot decode."""
    content = Path(path).read_bytes()
    image = decode(content)
    short = min(image.size)
    if short <= size:
        return Path(path).suffix.lower(), content
    width, height = (round(side * size / short) for side in image.size)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=quality, subsampling="4:4:4"
    )
    return ".jpg", buffer.getvalue()


def _write(
    source: Source, folder: Path, part: str, options: PrepareConfig, pool: Threads, bar: tqdm[Any]
) -> tuple[int, dict[str, str]]:
    """One split's shards; how many images they hold, and which files are not among them: name -> why."""

    def work(index: int) -> tuple[str, bytes] | str:
        try:
            return compact(str(source.load(index)), options.size, options.quality)
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
            # A key ends at its first dot. Names that differ by a dot or an extension alone get a number.
            key = (
                source.name(index)
                .removeprefix(f"{part}/" if part else "")
                .rpartition(".")[0]
                .replace(".", "_")
            )
            if key in keys:
                key = f"{key}-{index}"
            keys.add(key)
            members = {f"{key}{extension}": content}
            if source.labels is not None:
                members[f"{key}.cls"] = str(source.labels[index]).encode()
            shards.add(members)
    if not keys:
        raise ConfigError(
            f"none of the {len(source)} images can be decoded; {next(iter(skipped.items()))}"
        )
    return len(keys), skipped


class _Shards:
    """Tar files one after the other, each with its index once it is whole."""

    def __init__(self, folder: Path, limit: int) -> None:
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
        """The members of one sample, in one shard."""
        if self._tar is not None and self._tar.offset >= self._limit:
            self._end()
        if self._tar is None:
            self._path = self._folder / f"shard-{self._count:06}.tar"
            self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed by _end
            self._count += 1
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
        self._tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header until it is closed

    def _end(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            local_index(self._path)
